"""What was read together and is acknowledged together; and whether it may still be delivered."""

from __future__ import annotations

import threading
import time

from .store import Cursor, Progress, Told

_lock = threading.Lock()


class Reign:
    """The time in which this process may deliver what it has read for a part.

    It ends at ``deadline`` (``time.monotonic()``) unless that is moved on, and then for good: once
    one event has been held back, a later one of the same record must not overtake it.
    """

    __slots__ = ("deadline", "over")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.over = False

    def holds(self) -> bool:
        """Whether it goes on."""
        if not self.over and time.monotonic() > self.deadline:
            self.over = True
        return not self.over

    def end(self) -> None:
        """Deliver nothing more of what was read in it."""
        self.over = True


class Page:
    """Some messages of a window: ``done`` when each of their events has been taken care of.

    ``cursor`` is where the consumer stands then, ``count`` the number of their events. Whoever
    keeps an event for later holds the page, and releases it when that is done. With ``told`` it is
    of a Gap: what its receivers know when they have returned. With ``progress`` it is of a
    backfill: how far that has come then.
    """

    __slots__ = ("_holds", "count", "cursor", "handled", "progress", "reign", "told")

    def __init__(
        self,
        reign: Reign,
        cursor: Cursor,
        count: int,
        told: Told | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.reign = reign
        self.cursor = cursor
        self.count = count
        self.told = told
        self.progress = progress
        self.handled = False
        self._holds = 0

    @property
    def done(self) -> bool:
        """Whether the consumer may go past it."""
        return self.handled and not self._holds and not self.reign.over

    @property
    def bare(self) -> bool:
        """Whether it only moves the cursor."""
        return not (self.count or self.told or self.progress)

    def finish(self) -> None:
        """Every event has been handed to its receivers."""
        self.handled = True

    def hold(self) -> None:
        """An event of it waits for something."""
        with _lock:
            self._holds += 1

    def release(self) -> None:
        """It waits no more."""
        with _lock:
            self._holds -= 1
