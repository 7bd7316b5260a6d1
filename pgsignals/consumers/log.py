"""The log that durable delivery reads, whose positions only the log itself can interpret.

The outbox is one. A consumer's claims, acknowledgements, dead letters, parked events and backfills
are kept in tables of the schema ``pgsignals``, whatever the log is. A log says which columns hold a
position there, and which relation has its messages, if one has.
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
from ..postgres.snapshot import Snapshot
from ..triggers.definitions import Definition

if TYPE_CHECKING:
    from .consumer_store import Channels, ConsumerStore

# A moment of the log: all that was committed before, and nothing else. Only the log looks into it.
Watermark: TypeAlias = Any
# The transactions that were under way at a moment. Only the log looks into it.
Writers: TypeAlias = Any


@dataclass(frozen=True)
class Poll:
    """The log at one moment, and the count, read later, of what writers could not write to it.

    Whatever had been committed at ``as_of`` (``time.monotonic()``) lies before the watermark; None
    while that is not known of any time.
    """

    watermark: Watermark
    shed: int
    as_of: float | None


class Position(Protocol):
    """A place in a log up to which a partition has been read; only that log can interpret it."""

    @property
    def columns(self) -> Mapping[str, object]:
        """The values to store, by the log's columns of ``pgsignals.consumers``."""

    @property
    def whole(self) -> Position:
        """The position itself, or the last one before it where other triggers may begin to read."""


class Reader(Protocol):
    """The reader of one partition, from a position on."""

    @property
    def position(self) -> Position:
        """The position to acknowledge once receivers have taken all that was read."""

    @property
    def at_end(self) -> bool:
        """Whether everything has been read up to the latest watermark that was given."""

    @property
    def unsure(self) -> bool:
        """Whether another process may have delivered the next messages without acknowledging."""

    @property
    def ahead(self) -> bool:
        """Whether the log has yet to reach the position, since the log has gone back in time."""

    @property
    def lost(self) -> str:
        """Why the log does not hold everything behind the position any more; empty if it does."""

    @property
    def replayed_after(self) -> int | None:
        """The id behind which all messages of the log are read again; None if they are not."""

    def start_over(self) -> None:
        """Read all that the log holds from its beginning, since it is of another history.

        The acknowledged position stays until the first page is done: should this process die
        before, its successor sees by that position that the history is another.
        """

    def read_to(self, watermark: Watermark) -> None:
        """Go on up to a watermark, if everything before has been read."""

    def covers(self, watermark: Watermark) -> bool:
        """Whether everything has been read up to a watermark."""

    def read(self) -> list[Any] | None:
        """Return the next messages, as the log holds them; few or no messages at the end.

        None while somebody has locked them.
        """

    def doubts(self, message: Message) -> bool:
        """Whether another process may have delivered a message without acknowledging it.

        Ask for messages that were read, before ``turn``.
        """

    def turn(self, rows: Sequence[Any]) -> Position:
        """Go on behind what was read; return the position to acknowledge with it."""


class Log(Protocol):
    """A log as one consumer sees it, through the session of the thread that reads.

    ``columns`` are those of ``pgsignals.consumers`` that hold a position. ``start`` maps some of
    them, and ``shed``, to the SQL of their values for a consumer that begins now. ``missed`` is the
    condition on a row ``c`` that it has not read all that triggers wrote before ``%(made)s``.
    ``messages`` is the relation of the log's messages, with their ``id`` and ``payload``.
    ``marking`` is the SQL of the watermark at which a transaction sees its database. ``own`` is the
    condition that the consumer has its position in this log, and not in another.
    """

    columns: tuple[str, ...]
    start: Mapping[str, str]
    missed: str
    messages: str
    marking: str
    own: str

    @property
    def consumer(self) -> ConsumerStore:
        """The consumer's rows in the database."""

    def open(self) -> None:
        """Prepare the session: to be called once after it has connected."""

    def surroundings(self) -> tuple[str, datetime]:
        """Return the name of the log's history, and the server's clock.

        The name has the cluster, the database and the log in it and, behind a slash, the timeline,
        which each promotion changes.
        """

    def poll(self) -> Poll:
        """Return the log's present watermark and shed count."""

    def latest(self) -> Watermark:
        """Return a watermark behind everything that is committed by now."""

    def acknowledged(self, position: Position) -> None:
        """Take note that a position has been saved for the consumer."""

    def pause(self, worked: float) -> float:
        """Seconds until the next poll unless a notification comes; reading took ``worked``."""

    def wake(self) -> None:
        """Take note that there is something, or may be."""

    def stir(self) -> None:
        """Note that there may be something for other processes, which the next ``pause`` wakes."""

    def writers(self) -> Writers:
        """Return the transactions that may be writing by now."""

    def have_ended(self, writers: Writers, watermark: Watermark | None = None) -> bool:
        """Whether all these transactions had ended at a watermark or, without one, have by now."""

    def position(self, columns: Mapping[str, Any]) -> Position:
        """Return the position that the values of ``columns`` stand for."""

    def watermark(self, text: str) -> Watermark:
        """Return the watermark from the text that ``marking`` gave."""

    def reader(self, position: Position, clean: bool) -> Reader:
        """Return a reader from a position on; ``clean``: nobody has delivered what is behind it."""

    def left(self) -> None:
        """Take note that this process reads no partition any more."""

    def close(self) -> None:
        """End what the log has beside the session, which is ended by its owner."""

    def abandon(self) -> None:
        """In the child of a fork, give up the same, without touching the parent's."""

    def shed_detail(self, count: int) -> str:
        """Explain, for people, that ``count`` messages could not be written to the log, and why."""


class MovableLog(Log, Protocol):
    """A log that a consumer can leave for another one, and come to from another one."""

    def keep(self) -> None:
        """Have the log keep for the consumer, who comes from another one, what is committed now."""

    def keeps(self) -> bool:
        """Whether the log still has all since ``keep``."""

    def behind(self, snapshot: Snapshot) -> Position:
        """Return the position behind which is all that a snapshot does not see, since ``keep``."""

    def leave(self) -> None:
        """Get ready for ``end``, before anything is read."""

    def end(self) -> Watermark:
        """Return the watermark of now, and have readers leave out what it does not see."""

    def seen(self, position: Position) -> Snapshot:
        """Return the snapshot that sees what has been read at the ``end``, and nothing else."""

    def forsake(self) -> None:
        """Give up what is kept for the consumer, who has gone to another log."""


class MessageDecoder(Protocol):
    """Decodes the messages of one log after another, each read through a session of its own."""

    @property
    def channels(self) -> Channels:
        """The channels to read."""

    def begin(self, log: Log, definitions: Sequence[Definition], cast: Cast) -> None:
        """Go on in a new session."""

    def describe(self) -> None:
        """Read the descriptions of the channels again, since there are new ones."""

    def predecessors(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Return, by the name of each trigger, the names of its watcher's other triggers.

        The second mapping has only those that became the watcher's later: they are not read.
        """

    def decoders(self) -> dict[int, Decoder]:
        """Return each channel's decoder, for payloads of parked events and dead letters."""

    def channel_of(self, event: Event) -> int:
        """Return the channel that an event came through; 0, which none has, if it is forgotten."""

    def decode(self, found: Sequence[Any], since: datetime) -> Iterator[Message | Gap]:
        """Yield the messages that watchers want; for an unreadable one, a Gap from ``since`` on."""


@dataclass(frozen=True)
class DecoderHooks:
    """The callbacks by which a decoder asks and tells its source.

    ``now`` is the server's clock, and ``failure`` makes the Gap for a change that its trigger could
    not describe. ``foreign`` counts, by OID, the messages of tables that are not watched.
    ``refuse`` is called for a message that cannot be read, ``described`` after new channels have
    become known.
    """

    now: Callable[[], datetime]
    failure: Callable[[Broken], Gap]
    foreign: Counter[int]
    refuse: Callable[[], None]
    described: Callable[[], None]


class LogProvider(Protocol):
    """Makes the log and the decoder that a consumer reads with."""

    def log(self, session: Session, consumer: str, holder: str, timeout: float) -> Log:
        """Return the log, through a session in which no statement may outlast ``timeout``."""

    def decoder(self, hooks: DecoderHooks) -> MessageDecoder:
        """Return a decoder of the log's messages."""

    def missing_grants(self, cursor: Cursor) -> list[str]:
        """Return the statements that grant the role the privileges that it lacks for reading."""
