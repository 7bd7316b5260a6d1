"""Slow receivers, isolated where there are several workers: the others do not wait for them."""

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

# A call that has lasted so long, or twice that, is slow: the other receivers do not wait for it.
SLOW_SECONDS = 0.05
# An isolated receiver goes back to the workers after a time without a slow call.
QUIET_SECONDS = 60.0
# How many receivers may be isolated: each takes a thread beside each worker that calls it.
MOST_ISOLATED = 8


class Isolation:
    """Isolates a receiver that proves slow, for each worker that finds it so.

    The thread that is in the call becomes the receiver's own, with a queue of its own, and another
    goes on with what the worker has to do. What finds that queue full is dropped, and announced
    like the rest. ``jobs`` gives what a worker has to do, one thing after the other.
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
        """What has ended the slow-call monitor; empty when nothing has."""
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
        """There is something to do: calls may be slow; with the lock held."""
        if not self._busy.is_set():
            self._busy.set()

    def isolate(self, queue: WorkerQueue, key: Hashable, name: str) -> IsolatedQueue | None:
        """A receiver's queue beside a worker's, with the lock held.

        None where it would be one receiver too many, or threads have an end.
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
        """Have the other receivers go on behind each call that is seen twice."""
        queues = self._queues.queues
        seen: dict[WorkerQueue, int] = {}
        while not self._ending.wait(SLOW_SECONDS):
            with self._queues.lock:
                if not (self._ending.is_set() or any(queue.depth for queue in queues)):
                    self._busy.clear()
            self._busy.wait()
            # One call at most; a list is made of it in one go, whatever the queue's thread does.
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
            # The new thread takes the call from there: where there is no new thread, nothing is
            # changed.
            try:
                self._threads.start("worker", self._take_over, queue, number, isolated)
            except RuntimeError as error:
                log.warning("the receiver %s holds up others: %s", isolated.name, error)

    def _take_over(self, queue: WorkerQueue, number: int, isolated: IsolatedQueue) -> None:
        if (call := queue.running.get(number)) is None:
            return
        # Before the thread in the call can learn that it has lost the queue.
        event, receiver = call
        held = isolated.held = queue.caller.hold(receiver, event)
        # Nobody but its own thread keeps a receiver that blinker holds weakly.
        del call, receiver
        with self._queues.lock:
            ended = queue.running.pop(number, None) is None
            if not ended:
                queue.number = number
                queue.left[number] = isolated
                if isolated.key not in queue.isolated:
                    self._add(isolated)
                    # The call that has brought it here.
                    isolated.depth = 1
                    isolated.arrivals.append(queue.arrivals[0])
        if ended:
            if held is not None:
                held.release()
            return
        log.info(
            "the receiver %s is slow: it has a queue of its own for now",
            isolated.name,
            extra={"receiver": isolated.name},
        )
        self.work(queue, functools.partial(queue.attempt, queue.resume))

    def _divert(self, isolated: IsolatedQueue, receiver: Any, event: Event) -> bool:
        """Queue a call for an isolated receiver; False when the worker calls it again."""
        queues, caller = self._queues, isolated.worker.caller
        shed = begun = False
        held = caller.hold(receiver, event)
        with queues.lock:
            if not isolated.given_up and queues.has_to_shed(isolated):
                # One that catches up quickly is worth the wait.
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
                "the receiver %s is too slow: its events are dropped until there is room",
                isolated.name,
                extra={"receiver": isolated.name},
            )
        if shed:
            queues.count_shed(1)
        return True

    def _serve(self, isolated: IsolatedQueue) -> None:
        """Call an isolated receiver, until it may go back to the worker, or all is done."""
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
