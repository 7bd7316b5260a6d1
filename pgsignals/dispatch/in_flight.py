"""What has been read and not been acknowledged yet, in pages that are acknowledged as a whole.

A page goes out with its events, and comes home by ``acknowledge``, which is called when they have
been handed to their receivers. Whoever keeps one of them for later holds the page, and releases it
then. Once it is ``done``, its source acknowledges it where it was read.
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
    """Events that are acknowledged together, ``count`` of them.

    ``done`` when each of them has been taken care of: ``call``, if given, is made then, once or
    twice.
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
        """Whether its source may go past it."""
        return self.held_by(0)

    def held_by(self, count: int) -> bool:
        """Whether it is acknowledged, but for so many who hold it."""
        return self._acknowledged and self._holds == count and not self.lease.over

    def acknowledge(self) -> None:
        """Every event has been handed to its receivers."""
        self._acknowledged = True
        self._tell()

    def hold(self) -> None:
        """An event of it waits for something."""
        with _lock:
            self._holds += 1

    def release(self) -> None:
        """It waits no more."""
        with _lock:
            self._holds -= 1
        self._tell()

    def _tell(self) -> None:
        if self._call is not None and self.done:
            self._call()


class InFlight:
    """Messages of a broker between ``add`` and their acknowledgement, in their order.

    ``close`` ends a page: its ``call`` is made once it, and all pages before it, are done. The
    calls are made one at a time, in their order.
    """

    def __init__(self) -> None:
        # A broker has its own ways to find out that we are gone.
        self._lease = Lease(math.inf)
        self._changed = threading.Condition()
        self._open: Page | None = None
        self._closed: deque[tuple[Page, Callable[[], None]]] = deque()
        self._count = 0

    @property
    def count(self) -> int:
        """Events that are not acknowledged."""
        return self._count

    def add(self, message: Message) -> None:
        """Have the message's event held to account."""
        with self._changed:
            if self._open is None:
                self._open = self._page()
            self._open.count += 1
            self._count += 1
            message.page = self._open

    def close(self, call: Callable[[], None]) -> Page:
        """End the page, which the receivers acknowledge."""
        with self._changed:
            page, self._open = self._open or self._page(), None
            self._closed.append((page, call))
        return page

    def wait_for_less_than(self, count: int, timeout: float) -> bool:
        """Wait for at most ``timeout`` seconds until fewer events are here; whether they are."""
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
