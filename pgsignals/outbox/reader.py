"""Reads the outbox for a partition of a consumer: window by window, from a cursor on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..core.events import Message
from .cursors import BEGINNING, IdBounds, Snapshot, Window

if TYPE_CHECKING:
    from .log import OutboxLog

# A page: so many rows and so many bytes, or one row that is longer. Ten bytes may be an event, and
# a page of events is held in memory at once.
PAGE_ROWS = 2000
PAGE_BYTES = 256 << 10


@dataclass(frozen=True)
class Row:
    """A message in the outbox; ``relation`` is the OID of the table that its rows are of."""

    id: int
    channel: int
    relation: int
    payload: str


@dataclass(frozen=True)
class Cursor:
    """A position in the outbox: how far a partition has been read.

    All that ``snapshot`` sees; with a ``target``, also the rows up to ``last_id`` of the window
    between both. Rows that it does not see have ids above ``floor``.
    """

    snapshot: Snapshot
    floor: int
    target: Snapshot | None = None
    last_id: int = 0

    @property
    def columns(self) -> dict[str, object]:
        return {
            "snapshot": str(self.snapshot),
            "target": None if self.target is None else str(self.target),
            "last_id": self.last_id,
            "floor": self.floor,
        }

    @property
    def whole(self) -> Cursor:
        return self if self.target is None else Cursor(self.snapshot, self.floor)


class WindowReader:
    """Reads window after window of the ``log``.

    ``present`` is a snapshot from after the claim: what it sees may have been delivered, unless the
    former holder left the partition ``clean``.
    """

    def __init__(self, log: OutboxLog, cursor: Cursor, present: Snapshot, clean: bool) -> None:
        self.log = log
        self._present = present
        self.ahead = cursor.snapshot.xmax > present.xmax
        self._begin(cursor, None if clean else present)

    def _begin(self, cursor: Cursor, doubtful: Snapshot | None) -> None:
        self.since = cursor.snapshot
        self.last_id = cursor.last_id
        self.bounds = IdBounds(self.since.xmin, cursor.floor)
        self.window = None if cursor.target is None else self._window_to(cursor.target)
        # What somebody may have delivered who did not come to acknowledge it.
        self._doubtful = doubtful

    def _window_to(self, target: Snapshot) -> Window:
        window = Window.between(self.since, target, 0)
        after = min(self.bounds.below(x) for x in (self.since.xmax, *window.ended))
        return replace(window, after=after)

    @property
    def position(self) -> Cursor:
        floor = self.bounds.below(self.since.xmin)
        if self.window is None or not self.last_id:
            return Cursor(self.since, floor)
        return Cursor(self.since, floor, self.window.target, self.last_id)

    @property
    def at_end(self) -> bool:
        return self.window is None

    @property
    def unsure(self) -> bool:
        return self._doubtful is not None

    @property
    def replayed_after(self) -> int | None:
        return self.last_id if self.since == BEGINNING else None

    def start_over(self) -> None:
        self._begin(Cursor(BEGINNING, 0), self._present)

    def read_to(self, watermark: Snapshot) -> None:
        if self.window is None:
            window = self._window_to(watermark)
            if not window.empty:
                self.window = window

    def covers(self, watermark: Snapshot) -> bool:
        return self.since.covers(watermark)

    def read(self) -> list[Row] | None:
        assert self.window is not None
        return self.log.read(self.window, self.last_id)

    def turn(self, rows: Sequence[Row]) -> Cursor:
        """Go on behind rows of the window; where the consumer stands when they are acknowledged."""
        assert self.window is not None
        # Rows are counted in characters here, and cut by bytes there, of which four make one.
        size = sum(len(row.payload) for row in rows)
        if rows and (len(rows) >= PAGE_ROWS or 4 * size >= PAGE_BYTES):
            self.last_id = rows[-1].id
            return self.position
        self.since, self.window, self.last_id = self.window.target, None, 0
        self.bounds.forget(self.since.xmin)
        if self._doubtful is not None and self.since.xmin >= self._doubtful.xmax:
            self._doubtful = None
        return self.position

    def doubts(self, message: Message) -> bool:
        """Whether somebody may have delivered the message who did not acknowledge it.

        To be asked before the turn.
        """
        return self._doubtful is not None and self._doubtful.sees(message.txid)
