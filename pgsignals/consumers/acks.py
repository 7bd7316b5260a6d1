"""A partition of a consumer, in the process that reads it: its pages in flight, its position."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from ..dispatch.in_flight import Lease
from .consumer_store import Announced, Claim, Progress
from .log import Position, Reader
from .pages import LogPage


class Partition:
    """A partition that this process reads: the acknowledged position, and the pages in flight.

    ``reader`` reads what comes behind those. ``leaving``: it is given up once no page is in flight.
    """

    def __init__(self, claim: Claim, reader: Reader, lease_until: float) -> None:
        self.claim = claim
        self.lease = Lease(lease_until)
        self.acknowledged: Position = claim.position
        self.unsaved = 0
        self._saved_announced = claim.announced
        self.leaving = False
        self._begin(reader)

    def _begin(self, reader: Reader) -> None:
        # The losses that receivers know of once all pages in flight are done.
        self.announcing = self.claim.announced
        self.pages: deque[LogPage] = deque()
        self.outstanding = 0
        # The progress of backfills that is acknowledged, and not yet saved.
        self.progress: dict[int, Progress] = {}
        self.reader = reader

    def rewind(self, reader: Reader) -> None:
        """Read again, by a ``reader`` from the acknowledged position on."""
        deadline = self.lease.deadline
        self.lease.end()
        self.lease = Lease(deadline)
        self._begin(reader)

    def skip_to(self, reader: Reader) -> None:
        """Take all that comes before a reader's position for acknowledged, and go on there."""
        self.acknowledged = reader.position
        # The pages of Gaps are dropped with the others: the caller tells of those Gaps at once.
        self.claim = replace(self.claim, announced=self.announcing)
        self._begin(reader)

    def announce(self, announced: Announced) -> LogPage:
        """Add and return the page of a Gap, which is done when receivers have been told."""
        self.announcing = announced
        page = LogPage(self.lease, self.reader.position, 0, announced)
        self.pages.append(page)
        return page

    def add(self, page: LogPage) -> None:
        """Put a page behind those in flight."""
        # Of pages that only move the position, the last is enough; a quiet log would add many.
        last = self.pages[-1] if self.pages else None
        if last is not None and last.done and last.bare and not page.count:
            self.pages.pop()
        self.pages.append(page)
        self.outstanding += page.count

    @property
    def busy(self) -> bool:
        """Whether events or a Gap are in flight."""
        return self.outstanding > 0 or self.announcing != self.claim.announced

    @property
    def current(self) -> bool:
        """Whether everything up to the last poll of the log has been acknowledged."""
        return not self.pages and self.reader.at_end

    @property
    def dirty(self) -> bool:
        """Whether the database has yet to be told of something that was collected."""
        return bool(self.unsaved or self.progress or self.claim.announced != self._saved_announced)

    def saved(self) -> None:
        """Note that the database has what was collected."""
        self.unsaved = 0
        self.progress.clear()
        self._saved_announced = self.claim.announced

    def collect(self, parked: int = 0) -> None:
        """Take the pages off the front that are done, and the first ``parked``, done or not."""
        first = len(self.pages) - parked
        while self.pages and (self.pages[0].done or len(self.pages) > first):
            page = self.pages.popleft()
            self.acknowledged = page.position
            self.unsaved += page.count
            self.outstanding -= page.count
            if page.announced is not None:
                self.claim = replace(self.claim, announced=page.announced)
            if page.progress is not None:
                later = replace(page.progress, delivered=page.count)
                former = self.progress.get(later.number)
                self.progress[later.number] = former.then(later) if former is not None else later
        # Without a page, too, the reader's position may move: the outbox's has a floor that rises.
        if self.current:
            self.acknowledged = self.reader.position
