"""The delay queue: work that is done later, by a thread of its own or by one for each key."""

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
    """Has ``work`` done on each item when its time has come, in the thread ``name``.

    Where it is ``parallel``, the items of each ``key`` get a thread, ``beside``, of their own, one
    after the other, so that nobody waits for another.
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
        # By key, what is due; a thread for each key works on the first.
        self._ready: dict[Hashable, deque[T]] = {}
        self._beside = Threads()
        self._thread: Thread | None = None
        self._parallel = self._closed = False

    @property
    def running(self) -> bool:
        """Whether the thread is there."""
        return self._thread is not None

    @property
    def failure(self) -> str:
        """The error that has ended a thread; empty when nothing has."""
        thread = self._thread
        return ("" if thread is None else thread.failure) or self._beside.failure

    @property
    def items(self) -> list[T]:
        """The items that wait, and those of keys that have a thread."""
        with self._condition:
            ready = [item for queue in self._ready.values() for item in queue]
            return [*ready, *(item for _, _, item in self._due)]

    def forked(self) -> None:
        """In the child of a fork: what waits is the parent's, as are the threads."""
        self._condition = threading.Condition()
        self._due = []
        self._ready = {}
        self._thread = None

    def schedule(self, item: T, delay: float) -> None:
        """Have work done on ``item`` in ``delay`` seconds."""
        with self._condition:
            if not self._closed:
                heapq.heappush(self._due, (time.monotonic() + delay, next(self._order), item))
                self._condition.notify_all()

    def flush(self) -> None:
        """Work, in this thread, on all that waits."""
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
        """End the thread once it has worked on all that waits, within ``timeout`` seconds."""
        with self._condition:
            thread, self._thread = self._thread, None
            self._condition.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def wait(self, timeout: float) -> None:
        """Wait for the end of what is done beside the thread, except by the caller itself."""
        own = threading.current_thread().name == f"pgsignals-{self._beside_name}"
        with self._condition:
            self._condition.wait_for(lambda: len(self._ready) <= own, timeout)

    def close(self, timeout: float) -> None:
        """Drop what waits, for good, and end the thread within ``timeout`` seconds."""
        with self._condition:
            self._closed = True
            self._due = []
        self.stop(timeout)

    def _run(self) -> None:
        # Work may stop and start this: then another thread has taken over.
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
        """Leave an item to the thread of its key; returns whether there is one."""
        key = self._key(item)
        with self._condition:
            if (queue := self._ready.get(key)) is not None:
                # One that waits behind another, or behind itself, is worked on once all the same.
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
