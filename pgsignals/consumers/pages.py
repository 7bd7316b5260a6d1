"""A page of a log, and the position that is acknowledged with it."""

from __future__ import annotations

from ..dispatch.in_flight import Lease, Page
from .consumer_store import Announced, Progress
from .log import Position


class LogPage(Page):
    """Some messages of a log.

    ``position`` is where the consumer stands when it is done. With ``announced`` it is of a Gap:
    what its receivers know when they have returned. With ``progress`` it is of a backfill: how far
    that has come then.
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
        """Whether it only moves the position."""
        return not (self.count or self.announced or self.progress)
