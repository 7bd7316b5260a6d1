"""A part of a consumer, in the process that reads for it: what is acknowledged, what comes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from .cursors import BEGINNING, Floors, Snapshot, Window
from .pages import Page, Reign
from .store import PAGE_BYTES, PAGE_ROWS, Claim, Cursor, Look, Progress, Row, Told


class Part:
    """A part that this process reads: what is acknowledged, what is under way, what comes next."""

    def __init__(self, claim: Claim, look: Look, lease_until: float) -> None:
        self.claim = claim
        self.reign = Reign(lease_until)
        self.acknowledged = claim.cursor
        self.unsaved = 0
        self._saved_told = claim.told
        self.leaving = False
        self._begin(self.acknowledged, None if claim.clean else look.snapshot)

    def _begin(self, cursor: Cursor, doubtful: Snapshot | None) -> None:
        # What receivers know once all that is under way has been acknowledged.
        self.telling = self.claim.told
        self.pages: deque[Page] = deque()
        self.outstanding = 0
        # How far backfills have come with what is acknowledged, and not yet saved.
        self.progress: dict[int, Progress] = {}
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
        self._begin(self.acknowledged, look.snapshot)

    def start_over(self, look: Look) -> None:
        """Read from the beginning of what the outbox holds, since that is of another history.

        What was acknowledged stays so until the first page is: by it, whoever comes next sees that.
        """
        self._begin(Cursor(BEGINNING, 0), look.snapshot)

    def tell(self, told: Told) -> Page:
        """A page for a Gap, behind what has been read: done when receivers have been told."""
        self.telling = told
        page = Page(self.reign, self.position, 0, told)
        self.pages.append(page)
        return page

    def start_at(self, look: Look, first: int, given_out: int) -> None:
        """Leave out what ``look`` sees; transactions from ``first`` on have ids above given_out."""
        began_before = look.snapshot.xmin < first
        floor = self.acknowledged.floor if began_before else given_out
        self.acknowledged = Cursor(look.snapshot, floor)
        # A tail tells of a Gap at once.
        self.claim = replace(self.claim, told=self.telling)
        self._begin(self.acknowledged, None)
        self.floors.note(first, given_out)

    def _window_to(self, target: Snapshot) -> Window:
        window = Window.between(self.since, target, 0)
        after = min(self.floors.below(x) for x in (self.since.xmax, *window.ended))
        return replace(window, after=after)

    def advance(self, snapshot: Snapshot) -> None:
        """Where no window is being read, have one up to a snapshot."""
        if self.window is None:
            window = self._window_to(snapshot)
            if not window.empty:
                self.window = window

    def turn(self, rows: Sequence[Row]) -> Cursor:
        """Go on behind rows of the window; where the consumer stands when they are acknowledged."""
        assert self.window is not None
        # Rows are counted in characters here, and cut by bytes there, of which four make one.
        size = sum(len(row.payload) for row in rows)
        if rows and (len(rows) >= PAGE_ROWS or 4 * size >= PAGE_BYTES):
            self.last_id = rows[-1].id
            return self.position
        self.since, self.window, self.last_id = self.window.target, None, 0
        self.floors.forget(self.since.xmin)
        if self.doubtful is not None and self.since.xmin >= self.doubtful.xmax:
            self.doubtful = None
        return self.position

    def add(self, page: Page) -> None:
        """Put a page behind those that are under way."""
        # Of windows without a row, one page is enough.
        last = self.pages[-1] if self.pages else None
        if last is not None and last.done and last.bare and not page.count:
            self.pages.pop()
        self.pages.append(page)
        self.outstanding += page.count

    @property
    def position(self) -> Cursor:
        """Where reading stands."""
        floor = self.floors.below(self.since.xmin)
        if self.window is None or not self.last_id:
            return Cursor(self.since, floor)
        return Cursor(self.since, floor, self.window.target, self.last_id)

    @property
    def busy(self) -> bool:
        """Whether events or a Gap are under way."""
        return self.outstanding > 0 or self.telling != self.claim.told

    @property
    def current(self) -> bool:
        """Whether all that there was at the last look has been acknowledged."""
        return not self.pages and self.window is None

    @property
    def dirty(self) -> bool:
        """Whether what has been collected has yet to be saved."""
        return bool(self.unsaved or self.progress or self.claim.told != self._saved_told)

    def saved(self) -> None:
        """What has been collected is in the database."""
        self.unsaved = 0
        self.progress.clear()
        self._saved_told = self.claim.told

    def collect(self) -> None:
        """Take note of the pages that are done by now."""
        while self.pages and self.pages[0].done:
            page = self.pages.popleft()
            self.acknowledged = page.cursor
            self.unsaved += page.count
            self.outstanding -= page.count
            if page.told is not None:
                self.claim = replace(self.claim, told=page.told)
            if page.progress is not None:
                later = replace(page.progress, delivered=page.count)
                former = self.progress.get(later.number)
                self.progress[later.number] = former.then(later) if former is not None else later
        if self.current:
            self.acknowledged = self.position
