"""A part of a consumer, in the process that reads for it: what is acknowledged, what comes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from .cursors import Floors, Snapshot, Window
from .pages import Page, Reign
from .store import PAGE_BYTES, PAGE_ROWS, Claim, Cursor, Look, Row


class Part:
    """A part that this process reads: what is acknowledged, what is under way, what comes next."""

    def __init__(self, claim: Claim, look: Look, lease_until: float) -> None:
        self.claim = claim
        self.reign = Reign(lease_until)
        self.acknowledged = claim.cursor
        self.unsaved = 0
        self.leaving = False
        self._begin(None if claim.clean else look.snapshot)

    def _begin(self, doubtful: Snapshot | None) -> None:
        cursor = self.acknowledged
        self.pages: deque[Page] = deque()
        self.outstanding = 0
        self.since = cursor.snapshot
        self.last_id = cursor.last_id
        self.floors = Floors(self.since.xmin, cursor.floor)
        self.window = None if cursor.target is None else self._window_to(cursor.target)
        # What somebody may have delivered who did not come to acknowledge it.
        self.doubtful = doubtful

    def rewind(self, look: Look) -> None:
        """Read again from what is acknowledged."""
        deadline = self.reign.deadline
        self.reign.end()
        self.reign = Reign(deadline)
        self._begin(look.snapshot)

    def start_at(self, look: Look, first: int, given_out: int) -> None:
        """Leave out what ``look`` sees; transactions from ``first`` on have ids above given_out."""
        began_before = look.snapshot.xmin < first
        floor = self.acknowledged.floor if began_before else given_out
        self.acknowledged = Cursor(look.snapshot, floor)
        self._begin(None)
        self.floors.note(first, given_out)

    def _window_to(self, target: Snapshot) -> Window:
        window = Window.between(self.since, target, 0)
        after = min(self.floors.below(x) for x in (self.since.xmax, *window.ended))
        return replace(window, after=after)

    def advance(self, look: Look) -> None:
        """Where no window is being read, have one up to a look."""
        if self.window is None:
            window = self._window_to(look.snapshot)
            if not window.empty:
                self.window = window

    def turn(self, rows: Sequence[Row]) -> Cursor:
        """Go on behind rows of the window; where the consumer stands when they are acknowledged."""
        assert self.window is not None
        # Rows are counted in characters here, and cut by bytes there, of which four make one.
        size = sum(len(row.payload) for row in rows)
        if rows and (len(rows) >= PAGE_ROWS or 4 * size >= PAGE_BYTES):
            self.last_id = rows[-1].id
            floor = self.floors.below(self.since.xmin)
            return Cursor(self.since, floor, self.window.target, self.last_id)
        self.since, self.window, self.last_id = self.window.target, None, 0
        floor = self.floors.below(self.since.xmin)
        self.floors.forget(self.since.xmin)
        if self.doubtful is not None and self.since.xmin >= self.doubtful.xmax:
            self.doubtful = None
        return Cursor(self.since, floor)

    def add(self, page: Page) -> None:
        """Put a page behind those that are under way."""
        # Of windows without a row, one page is enough.
        if not page.count and self.pages and not self.pages[-1].count and self.pages[-1].done:
            self.pages.pop()
        self.pages.append(page)
        self.outstanding += page.count

    @property
    def current(self) -> bool:
        """Whether all that there was at the last look has been acknowledged."""
        return not self.pages and self.window is None

    def collect(self) -> bool:
        """Take note of the pages that are done by now; whether there are new ones."""
        before = self.unsaved
        while self.pages and self.pages[0].done:
            page = self.pages.popleft()
            self.acknowledged = page.cursor
            self.unsaved += page.count
            self.outstanding -= page.count
        if self.current:
            self.acknowledged = Cursor(self.since, self.floors.below(self.since.xmin))
        return self.unsaved > before
