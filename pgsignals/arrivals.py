"""What has come from a broker and is not acknowledged yet: in its order, in pages."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .events import Message
from .outbox.pages import Reign


class Arrivals:
    """Messages between ``add`` and their acknowledgement.

    ``close`` ends a page: its ``call`` is made once each event of it, and of all pages before it,
    has been taken care of. The calls are made one at a time, in their order.
    """

    def __init__(self) -> None:
        # A broker has its own ways to find out that we are gone.
        self._reign = Reign(math.inf)
        self._changed = threading.Condition()
        self._open: _Page | None = None
        self._closed: deque[_Page] = deque()
        self._count = 0

    @property
    def count(self) -> int:
        """Events that are not acknowledged."""
        return self._count

    def add(self, message: Message) -> None:
        """Have the message's events held to account."""
        with self._changed:
            if self._open is None:
                self._open = _Page(self, self._reign)
            self._open.count += 1
            self._count += 1
            message.page = self._open

    def close(self, call: Callable[[], None]) -> Callable[[], None]:
        """End the page; what to call once the events have been handed to their receivers."""
        with self._changed:
            page = self._open or _Page(self, self._reign)
            self._open = None
            page.call = call
            self._closed.append(page)
        return page.finish

    def wait_for_less_than(self, count: int, timeout: float) -> bool:
        """Wait for at most ``timeout`` seconds until fewer events are here; whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count < count, timeout)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Acknowledge, after a change of a page, those at the front that are done."""
        with self._changed:
            yield
            while self._closed and self._closed[0].done:
                page = self._closed.popleft()
                self._count -= page.count
                assert page.call is not None
                page.call()
            self._changed.notify_all()


class _Page:
    """See outbox.pages.Page: whoever keeps an event for later holds it, and releases it then."""

    __slots__ = ("_arrivals", "_handled", "_holds", "call", "count", "reign")

    def __init__(self, arrivals: Arrivals, reign: Reign) -> None:
        self.reign = reign
        self.count = 0
        self.call: Callable[[], None] | None = None
        self._arrivals = arrivals
        self._handled = False
        self._holds = 0

    @property
    def done(self) -> bool:
        """Whether it can be acknowledged."""
        return self._handled and not self._holds

    def finish(self) -> None:
        """Every event has been handed to its receivers."""
        with self._arrivals.changing():
            self._handled = True

    def hold(self) -> None:
        """An event of it waits for something."""
        with self._arrivals.changing():
            self._holds += 1

    def release(self) -> None:
        """It waits no more."""
        with self._arrivals.changing():
            self._holds -= 1
