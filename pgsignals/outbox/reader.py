"""Reads the outbox for a partition of a consumer: window by window, from a cursor on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..consumers.decoding import Row
from ..core.events import Message
from ..postgres.snapshot import Snapshot
from .cursors import BEGINNING, IdBounds, Window

if TYPE_CHECKING:
    from .log import OutboxLog

# The most rows and bytes of a page, unless one row alone is longer. Bytes count as well as rows: a
# row may hold many events, some of ten bytes only, and memory holds all events of a page at once.
PAGE_ROWS = 2000
PAGE_BYTES = 256 << 10


@dataclass(frozen=True)
class Cursor:
    """A position in the outbox: how far a partition has been read.

    All rows that ``snapshot`` sees have been read; with a ``target``, also the rows up to
    ``last_id`` of the window between both. Rows that ``snapshot`` does not see have ids above
    ``floor``.
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

    ``present`` is a snapshot from after the claim: the former holder may have delivered rows that
    it sees, unless that holder left the partition ``clean``.
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
        # Rows that this sees may have been delivered by a process that did not acknowledge them.
        self._doubtful = doubtful

    def _window_to(self, target: Snapshot) -> Window:
        window = Window.between(self.since, target, 0)
        # All its rows are of transactions from since.xmax on, or of those that have ended since.
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
    def lost(self) -> str:
        # Housekeeping marks the loss of what it drops.
        return ""

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
        """Go on behind rows of the window; return the position to acknowledge with them."""
        assert self.window is not None
        # The server cuts a page by bytes, and up to four of them are one character here. A page
        # that may have been cut is taken for full: otherwise the rest of the window would be lost.
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
        """Whether another process may have delivered the message without acknowledging it.

        Ask before ``turn``, which may end the doubt.
        """
        return self._doubtful is not None and self._doubtful.sees(message.txid)
