"""Pages of events in flight, which are acknowledged as a whole.

A page goes out with its events. ``acknowledge`` is called when they have been handed to their
receivers. A receiver that keeps an event for later holds the page, and releases it when the event
is taken. Once the page is ``done``, its source acknowledges it where it was read.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from ..core.events import Message

_lock = threading.Lock()


class Lease:
    """The time in which this process may deliver what it has read of a partition.

    The lease ends at ``deadline`` (``time.monotonic()``) unless that is moved on. Once over, it
    stays over: an event was held back then, and a later one of the same record must not overtake
    it.
    """

    __slots__ = ("deadline", "over")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.over = False

    def holds(self) -> bool:
        """Whether the lease goes on."""
        if not self.over and time.monotonic() > self.deadline:
            self.over = True
        return not self.over

    def end(self) -> None:
        """End the lease: deliver nothing more of what was read in it."""
        self.over = True


class Page:
    """Events that are acknowledged together, ``count`` of them.

    The page is ``done`` when each of them has been taken care of. ``call``, if given, is called
    then; twice, if two threads find the page done at the same time.
    """

    __slots__ = ("_acknowledged", "_call", "_holds", "count", "lease")

    def __init__(
        self, lease: Lease, count: int = 0, call: Callable[[], None] | None = None
    ) -> None:
        self.lease = lease
        self.count = count
        self._call = call
        self._acknowledged = False
        self._holds = 0

    @property
    def done(self) -> bool:
        """Whether the source may acknowledge the page."""
        return self.held_by(0)

    def held_by(self, count: int) -> bool:
        """Whether only so many holds keep the page from being done."""
        return self._acknowledged and self._holds == count and not self.lease.over

    def acknowledge(self) -> None:
        """Note that every event has been handed to its receivers."""
        self._acknowledged = True
        self._tell()

    def hold(self) -> None:
        """Keep the page from being done, since an event of it is kept for later."""
        with _lock:
            self._holds += 1

    def release(self) -> None:
        """Undo one ``hold``."""
        with _lock:
            self._holds -= 1
        self._tell()

    def _tell(self) -> None:
        if self._call is not None and self.done:
            self._call()


class InFlight:
    """Messages of a broker between ``add`` and their acknowledgement, in their order.

    ``close`` ends a page: its ``call`` is made once the page and all before it are done. The calls
    are made one at a time, in their order.
    """

    def __init__(self) -> None:
        # An endless lease: a broker has its own ways to find out that we are gone.
        self._lease = Lease(math.inf)
        self._changed = threading.Condition()
        self._open: Page | None = None
        self._closed: deque[tuple[Page, Callable[[], None]]] = deque()
        self._count = 0

    @property
    def count(self) -> int:
        """The number of events that are not acknowledged."""
        return self._count

    def add(self, message: Message) -> None:
        """Add the event of a message to the open page."""
        with self._changed:
            if self._open is None:
                self._open = self._page()
            self._open.count += 1
            self._count += 1
            message.page = self._open

    def close(self, call: Callable[[], None]) -> Page:
        """End the open page, and return it."""
        with self._changed:
            page, self._open = self._open or self._page(), None
            self._closed.append((page, call))
        return page

    def wait_for_less_than(self, count: int, timeout: float) -> bool:
        """Wait until fewer events are in flight; return whether they are within ``timeout`` s."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count < count, timeout)

    def _page(self) -> Page:
        return Page(self._lease, call=self._collect)

    def _collect(self) -> None:
        """Make the calls of the pages at the front that are done."""
        with self._changed:
            while self._closed and self._closed[0][0].done:
                page, call = self._closed.popleft()
                self._count -= page.count
                call()
            self._changed.notify_all()
