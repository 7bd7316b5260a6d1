"""The log that durable delivery reads, whose positions only the log itself can interpret.

The outbox is one. A consumer's claims, acknowledgements, dead letters, parked events and backfills
are kept in tables of the schema ``pgsignals``, whatever the log is; a log says what of a position
stands there, and where its own messages are found, if anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..core.events import Message

if TYPE_CHECKING:
    from .consumer_store import ConsumerStore

# A moment of the log: what was committed before it, and nothing else. Only the log looks into it.
Watermark: TypeAlias = Any


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

    def read(self) -> list[Any]:
        """The next messages, as the log holds them; none, or few, at the end.

        Raises LockNotAvailable while somebody has locked them.
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

    def position(self, columns: Mapping[str, Any]) -> Position:
        """The position of which ``columns`` are kept."""

    def watermark(self, text: str) -> Watermark:
        """The watermark that ``marking`` has told."""

    def reader(self, position: Position, clean: bool) -> Reader:
        """A reader from a position on; ``clean``: nothing behind it has been delivered."""

    def shed_detail(self, count: int) -> str:
        """Explain to people that writers have left out ``count`` messages, and why that happens."""
