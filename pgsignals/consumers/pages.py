"""A page of a log, and the position that is acknowledged with it."""

from __future__ import annotations

from ..dispatch.in_flight import Lease, Page
from .consumer_store import Announced, Progress
from .log import Position


class LogPage(Page):
    """A page of a log: some messages, a Gap, or a chunk of a backfill.

    ``position`` is acknowledged when the page is done. The page of a Gap has ``announced``, the
    losses that receivers know of then; that of a chunk has ``progress``, the backfill's then.
    """

    __slots__ = ("announced", "position", "progress")

    def __init__(
        self,
        lease: Lease,
        position: Position,
        count: int,
        announced: Announced | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(lease, count)
        self.position = position
        self.announced = announced
        self.progress = progress

    @property
    def bare(self) -> bool:
        """Whether the page only moves the position."""
        return not (self.count or self.announced or self.progress)
