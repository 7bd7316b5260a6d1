"""Isolates slow receivers where there are several workers, so that other receivers go on."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from queue import Empty
from typing import Any

from ..core.events import Event
from ..core.logging import log
from ..core.threads import Thread, Threads
from .queues import IsolatedQueue, Item, Job, Queues, Replaced, WorkerQueue, current, receiver_key
from .registry import receiver_name

# A call is slow once it has lasted from this long to twice as long; other receivers go on then.
SLOW_SECONDS = 0.05
# An isolated receiver goes back to the workers after a time without a slow call.
QUIET_SECONDS = 60.0
# The most receivers that are isolated at once: each takes a thread for each worker that calls it.
MOST_ISOLATED = 8


class Isolation:
    """Isolates a receiver that proves slow, for each worker that finds it so.

    The thread in the slow call becomes the receiver's own, with a queue of its own, and a new
    thread takes over the worker's queue. Events that do not fit into an isolated queue are dropped,
    and announced by a Gap like those of a worker. ``jobs`` gives a queue's jobs one by one.
    """

    def __init__(
        self, queues: Queues, threads: Threads, jobs: Callable[[WorkerQueue], Iterator[Job]]
    ) -> None:
        self._queues = queues
        self._threads = threads
        for queue in queues.queues:
            queue.jobs = jobs(queue)
            queue.divert = self._divert
        self._monitor: Thread | None = None
        self._busy = threading.Event()
        self._ending = threading.Event()

    @property
    def failure(self) -> str:
        """The error that has ended the slow-call monitor; empty if there was none."""
        return "" if self._monitor is None else self._monitor.failure

    def start(self) -> None:
        """Start the slow-call monitor."""
        self._monitor = Thread("slow-call-monitor", self._watch)
        self._monitor.start()

    def stop(self) -> None:
        """End the slow-call monitor."""
        with self._queues.lock:
            self._ending.set()
            self._busy.set()
        if self._monitor is not None:
            self._monitor.join()

    def wake(self) -> None:
        """Wake the monitor, since there are calls to come; with the lock held."""
        if not self._busy.is_set():
            self._busy.set()

    def isolate(self, queue: WorkerQueue, key: Hashable, name: str) -> IsolatedQueue | None:
        """Return a receiver's isolated queue beside a worker's; with the lock held.

        None if MOST_ISOLATED others are isolated, or no thread can be started.
        """
        if self._too_many(key):
            return None
        if (isolated := queue.isolated.get(key)) is None:
            isolated = IsolatedQueue(queue, key, name)
            try:
                self._threads.start("aside", self._serve, isolated)
            except RuntimeError:  # At interpreter exit there are no new threads.
                return None
            self._add(isolated)
        return isolated

    def _add(self, isolated: IsolatedQueue) -> None:
        isolated.worker.isolated[isolated.key] = isolated
        self._queues.isolated = [*self._queues.isolated, isolated]

    def _too_many(self, key: Hashable) -> bool:
        return len({each.key for each in self._queues.isolated} | {key}) > MOST_ISOLATED

    def work(self, queue: WorkerQueue, resume: Job | None = None) -> None:
        """Work on a queue until it ends, or another thread has taken it over."""
        current.queue = queue
        try:
            if resume is not None:
                resume()
            for job in queue.jobs:
                job()
        except Replaced as replaced:
            with self._queues.lock:
                isolated = queue.left.pop(replaced.number)
                served = queue.isolated.get(isolated.key) is not isolated
        else:
            with self._queues.lock:
                for isolated in queue.isolated.values():
                    isolated.items.put(None)
            return
        current.queue = None
        if isolated.held is not None:
            isolated.held.release()
            isolated.held = None
        if not served:
            self._queues.done(isolated, 1)
            self._serve(isolated)

    def _watch(self) -> None:
        """Isolate the receiver of each call that is under way at two looks in a row."""
        queues = self._queues.queues
        seen: dict[WorkerQueue, int] = {}
        while not self._ending.wait(SLOW_SECONDS):
            with self._queues.lock:
                if not (self._ending.is_set() or any(queue.depth for queue in queues)):
                    self._busy.clear()
            self._busy.wait()
            # At most one call a queue. ``list`` copies it at one go, while the queue's thread goes
            # on.
            calls = {queue: number for queue in queues for number in list(queue.running)}
            for queue, number in calls.items():
                if seen.get(queue) == number:
                    self._replace(queue, number)
            seen = calls

    def _replace(self, queue: WorkerQueue, number: int) -> None:
        call = queue.running.get(number)
        if call is None or queue.caller.is_alone(call[1]):
            return
        isolated = IsolatedQueue(queue, receiver_key(call[1]), receiver_name(call[1]))
        with self._queues.lock:
            if self._too_many(isolated.key):
                return
            # The new thread takes the call over by itself: if it cannot be started, nothing has
            # changed.
            try:
                self._threads.start("worker", self._take_over, queue, number, isolated)
            except RuntimeError as error:
                log.warning(
                    "the receiver %s is slow and holds up others, since no thread can be started "
                    "for it: %s",
                    isolated.name,
                    error,
                )

    def _take_over(self, queue: WorkerQueue, number: int, isolated: IsolatedQueue) -> None:
        if (call := queue.running.get(number)) is None:
            return
        # Hold the event before the thread in the call can learn that it has lost the queue: that
        # thread releases the event when the call ends.
        event, receiver = call
        held = isolated.held = queue.caller.hold(receiver, event)
        # Only the thread in the call may keep alive a receiver that blinker holds weakly.
        del call, receiver
        with self._queues.lock:
            ended = queue.running.pop(number, None) is None
            if not ended:
                queue.number = number
                queue.left[number] = isolated
                if isolated.key not in queue.isolated:
                    self._add(isolated)
                    # One for the call that is under way.
                    isolated.depth = 1
                    isolated.arrivals.append(queue.arrivals[0])
        if ended:
            if held is not None:
                held.release()
            return
        log.info(
            "the receiver %s is slow: it has a queue of its own for now, and others go on",
            isolated.name,
            extra={"receiver": isolated.name},
        )
        self.work(queue, functools.partial(queue.attempt, queue.resume))

    def _divert(self, isolated: IsolatedQueue, receiver: Any, event: Event) -> bool:
        """Queue a call for an isolated receiver; False if the worker has to call it again."""
        queues, caller = self._queues, isolated.worker.caller
        shed = begun = False
        held = caller.hold(receiver, event)
        with queues.lock:
            if not isolated.given_up and queues.has_to_shed(isolated):
                # Wait a little before dropping: the receiver may catch up.
                queues.room.wait_for(lambda: not isolated.full or queues.stopping, SLOW_SECONDS)
                begun = isolated.given_up = queues.has_to_shed(isolated)
            if ended := isolated.ended:
                pass
            elif shed := isolated.given_up:
                queues.drop(isolated, [event])
            else:
                isolated.put(1, functools.partial(caller.call, receiver, event, held))
        if ended:
            if held is not None:
                held.release()
            return False
        if begun:
            log.error(
                "the receiver %s is too slow: its events are dropped until there is room, and a "
                "Gap is announced",
                isolated.name,
                extra={"receiver": isolated.name},
            )
        if shed:
            queues.count_shed(1)
        return True

    def _serve(self, isolated: IsolatedQueue) -> None:
        """Call an isolated receiver until it goes back to the worker, or its queue ends."""
        while (item := self._next(isolated)) is not None:
            count, call = item
            assert callable(call)
            began = time.monotonic()
            call()
            if time.monotonic() - began >= SLOW_SECONDS:
                isolated.slow_at = time.monotonic()
            self._queues.done(isolated, count)

    def _next(self, isolated: IsolatedQueue) -> Item:
        while True:
            quiet = isolated.slow_at + QUIET_SECONDS - time.monotonic()
            try:
                item = isolated.items.get(timeout=max(0.0, quiet))
            except Empty:
                item = None
            if item is not None:
                return item
            with self._queues.lock:
                if isolated.items.empty():
                    isolated.ended = True
                    del isolated.worker.isolated[isolated.key]
                    others = [each for each in self._queues.isolated if each is not isolated]
                    self._queues.isolated = others
                    return None
