"""The log that durable delivery reads, whose positions only the log itself can interpret.

The outbox is one. A consumer's claims, acknowledgements, dead letters, parked events and backfills
are kept in tables of the schema ``pgsignals``, whatever the log is; a log says what of a position
stands there, and where its own messages are found, if anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from psycopg2.extensions import cursor as Cursor

from ..core.events import Event, Gap, Message
from ..core.payload import Broken, Cast, Decoder
from ..postgres.session import Session
from ..triggers.definitions import Definition

if TYPE_CHECKING:
    from .consumer_store import Channels, ConsumerStore

# A moment of the log: what was committed before it, and nothing else. Only the log looks into it.
Watermark: TypeAlias = Any
# Those whose transactions were under way at a moment. Only the log looks into it.
Writers: TypeAlias = Any


@dataclass(frozen=True)
class Poll:
    """The log at one moment, and how much writers had left out a little later."""

    watermark: Watermark
    shed: int


class Position(Protocol):
    """A place in a log up to which a partition has been read; only that log can interpret it."""

    @property
    def columns(self) -> Mapping[str, object]:
        """The values to store, by the log's columns of ``pgsignals.consumers``."""

    @property
    def whole(self) -> Position:
        """The nearest one before it where reading through other triggers may begin; or itself."""


class Reader(Protocol):
    """The reader of one partition, from a position on."""

    @property
    def position(self) -> Position:
        """The position that is acknowledged once all that was read is."""

    @property
    def at_end(self) -> bool:
        """Whether everything has been read up to the latest watermark that was given."""

    @property
    def unsure(self) -> bool:
        """Whether somebody may have delivered what comes next who did not acknowledge it."""

    @property
    def ahead(self) -> bool:
        """Whether the position is one that the log has yet to reach: it has gone back in time."""

    @property
    def replayed_after(self) -> int | None:
        """The message behind which all that the log holds is read; None when it is not."""

    def start_over(self) -> None:
        """Read from the beginning of what the log holds, since that is of another history.

        What was acknowledged stays so until the first page is: by it, whoever comes next sees that.
        """

    def read_to(self, watermark: Watermark) -> None:
        """Go on up to a watermark, if everything before has been read."""

    def covers(self, watermark: Watermark) -> bool:
        """Whether everything has been read up to a watermark."""

    def read(self) -> list[Any] | None:
        """The next messages, as the log holds them; none, or few, at the end.

        None while somebody has locked them.
        """

    def doubts(self, message: Message) -> bool:
        """Whether somebody may have delivered a message that was read who did not acknowledge it.

        To be asked before the turn.
        """

    def turn(self, rows: Sequence[Any]) -> Position:
        """Go on behind what was read; where the consumer stands when that is acknowledged."""


class Log(Protocol):
    """A log as one consumer sees it, through the session of the thread that reads.

    In ``pgsignals.consumers``, ``columns`` hold a position; ``start`` has, by some of them and
    ``shed``, the SQL of what stands there for one who begins now. ``missed`` is the condition on a
    row ``c`` that some of what triggers wrote before ``%(made)s`` has not been read. ``messages``
    is the relation of the log's messages, with their ``id`` and ``payload``. ``marking`` is the SQL
    of the watermark at which a transaction sees its database.
    """

    columns: tuple[str, ...]
    start: Mapping[str, str]
    missed: str
    messages: str
    marking: str

    @property
    def consumer(self) -> ConsumerStore:
        """The consumer's rows in the database."""

    def open(self) -> None:
        """Prepare the session: to be called once after it has connected."""

    def surroundings(self) -> tuple[str, datetime]:
        """The name of this history, and the server's clock.

        The history is that of the cluster, the database and the log in it, and, behind a slash, of
        the promotions that led here.
        """

    def poll(self) -> Poll:
        """What there is by now."""

    def pause(self, worked: float) -> float:
        """Seconds until the next poll, if nothing is heard before; the last took ``worked``."""

    def wake(self) -> None:
        """Take note that there is something, or may be."""

    def stir(self) -> None:
        """Have the consumers of other processes told, with a pause, that there may be something."""

    def writers(self) -> Writers:
        """Those who may be writing by now."""

    def have_ended(self, writers: Writers, watermark: Watermark | None = None) -> bool:
        """Whether all of them had ended at a watermark, or have by now."""

    def position(self, columns: Mapping[str, Any]) -> Position:
        """The position of which ``columns`` are kept."""

    def watermark(self, text: str) -> Watermark:
        """The watermark that ``marking`` has told."""

    def reader(self, position: Position, clean: bool) -> Reader:
        """A reader from a position on; ``clean``: nothing behind it has been delivered."""

    def shed_detail(self, count: int) -> str:
        """Explain to people that writers have left out ``count`` messages, and why that happens."""


class MessageDecoder(Protocol):
    """Decodes what one log after another holds, each read through a session of its own."""

    @property
    def channels(self) -> Channels:
        """The channels to read."""

    def begin(self, log: Log, definitions: Sequence[Definition], cast: Cast) -> None:
        """Go on in a new session."""

    def describe(self) -> None:
        """Learn of channels that were not known."""

    def predecessors(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """By the name of each trigger, those that its watcher has had before.

        The second has those alone that are younger: they are not read any more.
        """

    def decoders(self) -> dict[int, Decoder]:
        """The decoder of each channel, for payloads that were kept."""

    def channel_of(self, event: Event) -> int:
        """The channel that an event came through; 0, which none has, if that is forgotten."""

    def decode(self, found: Sequence[Any], since: datetime) -> Iterator[Message | Gap]:
        """What was read is to the watchers; what cannot be read was written after ``since``."""


@dataclass(frozen=True)
class DecoderHooks:
    """What a decoder asks and tells whoever reads with it.

    ``now`` is the server's clock, and ``failure`` gives the Gap for what a trigger could not
    describe. ``foreign`` counts, by OID, the messages of tables that are not the watched ones.
    ``refuse`` is called for a message that cannot be read, ``described`` when channels have become
    known.
    """

    now: Callable[[], datetime]
    failure: Callable[[Broken], Gap]
    foreign: Counter[int]
    refuse: Callable[[], None]
    described: Callable[[], None]


class LogProvider(Protocol):
    """Makes what a consumer reads with."""

    def log(self, session: Session, consumer: str, holder: str, timeout: float) -> Log:
        """The log, through a session in which no statement takes longer than ``timeout``."""

    def decoder(self, hooks: DecoderHooks) -> MessageDecoder:
        """The decoder of the log."""

    def missing_grants(self, cursor: Cursor) -> list[str]:
        """The statements that give the role what reading takes, and it lacks."""
