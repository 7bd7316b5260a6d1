"""The delay queue: does work later, in a thread of its own, or in one for each key."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from ..core.threads import Thread, Threads

T = TypeVar("T")


class DelayQueue(Generic[T]):
    """Calls ``work`` with each item when its time has come, in the thread ``name``.

    With ``parallel``, the items of each ``key`` are worked on one after the other in a thread of
    their own, named ``beside``, so that no key waits for another.
    """

    def __init__(
        self,
        name: str,
        beside: str,
        work: Callable[[T], object],
        key: Callable[[T], Hashable],
    ) -> None:
        self._name = name
        self._beside_name = beside
        self._work = work
        self._key = key
        self._condition = threading.Condition()
        self._due: list[tuple[float, int, T]] = []
        self._order = itertools.count()
        # The due items by key; a thread for each key works on the first of its items.
        self._ready: dict[Hashable, deque[T]] = {}
        self._beside = Threads()
        self._thread: Thread | None = None
        self._parallel = self._closed = False

    @property
    def running(self) -> bool:
        """Whether the thread has been started, and not been stopped."""
        return self._thread is not None

    @property
    def failure(self) -> str:
        """The error that has ended a thread; empty if there was none."""
        thread = self._thread
        return ("" if thread is None else thread.failure) or self._beside.failure

    @property
    def items(self) -> list[T]:
        """The items that wait, and those of keys that have a thread."""
        with self._condition:
            ready = [item for queue in self._ready.values() for item in queue]
            return [*ready, *(item for _, _, item in self._due)]

    def forked(self) -> None:
        """In the child of a fork, forget the items and threads, which are the parent's."""
        self._condition = threading.Condition()
        self._due = []
        self._ready = {}
        self._thread = None

    def schedule(self, item: T, delay: float) -> None:
        """Add ``item``, which is worked on in ``delay`` seconds."""
        with self._condition:
            if not self._closed:
                heapq.heappush(self._due, (time.monotonic() + delay, next(self._order), item))
                self._condition.notify_all()

    def flush(self) -> None:
        """Work on all waiting items in the caller's thread."""
        with self._condition:
            due, self._due = sorted(self._due), []
        for _, _, item in due:
            self._work(item)

    def start(self, parallel: bool = False) -> None:
        """Start the thread."""
        self._parallel = parallel
        self._thread = Thread(self._name, self._run)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread once it has worked on all due items, within ``timeout`` seconds."""
        with self._condition:
            thread, self._thread = self._thread, None
            self._condition.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def wait(self, timeout: float) -> None:
        """Wait for the threads of keys to end their work, except for the caller's own."""
        # A thread of a key that calls this waits for all keys but its own.
        own = threading.current_thread().name == f"pgsignals-{self._beside_name}"
        with self._condition:
            self._condition.wait_for(lambda: len(self._ready) <= own, timeout)

    def close(self, timeout: float) -> None:
        """Drop all waiting items, for good, and end the thread within ``timeout`` seconds."""
        with self._condition:
            self._closed = True
            self._due = []
        self.stop(timeout)

    def _run(self) -> None:
        # Work may stop this queue and start it again: then another thread has taken over.
        own = threading.current_thread()
        while True:
            with self._condition:
                while self._thread is own and (not self._due or self._due[0][0] > time.monotonic()):
                    self._condition.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if not self._due:
                    return
                _, _, item = heapq.heappop(self._due)
            if not (self._parallel and self._hand_over(item)):
                self._work(item)

    def _hand_over(self, item: T) -> bool:
        """Leave an item to the thread of its key; return whether there is one."""
        key = self._key(item)
        with self._condition:
            if (queue := self._ready.get(key)) is not None:
                # An item that waits as the last already, behind another or itself, is not added.
                if len(queue) == 1 or queue[-1] is not item:
                    queue.append(item)
                return True
            queue = deque([item])
            try:
                self._beside.start(self._beside_name, self._serve, key, queue)
            except RuntimeError:  # At interpreter exit there are no new threads.
                return False
            self._ready[key] = queue
            return True

    def _serve(self, key: Hashable, queue: deque[T]) -> None:
        while queue and not self._closed:
            self._work(queue[0])
            with self._condition:
                queue.popleft()
                if not queue:
                    del self._ready[key]
                    self._condition.notify_all()
