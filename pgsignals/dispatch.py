"""From messages to receivers: bounded queues, workers, order per record."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from .broadcasters import Broadcaster
from .events import Event, Message, hashable

log = logging.getLogger("pgsignals")

_Item = list[Event] | Callable[[], object] | None


class _Once:
    """A call that the first worker to reach it makes, while the others wait at it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._done = False

    def __call__(self) -> None:
        with self._lock:
            if not self._done:
                self._done = True
                self._call()


class _Last:
    """A call that the last of several workers to reach it makes; nobody waits for it."""

    def __init__(self, call: Callable[[], None], workers: int) -> None:
        self._call = call
        self._left = workers
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._call()


class Dispatcher:
    """Hands events to the broadcasters from worker threads.

    Events of one record are handled by one worker, in order. ``depth`` counts the events that are
    queued; whoever submits looks at it, or waits for room.
    """

    def __init__(self, broadcasters: Sequence[Broadcaster], workers: int, queue_size: int) -> None:
        self._broadcasters = tuple(broadcasters)
        self._queue_size = queue_size
        self._room = threading.Condition()
        self._depth = 0
        self._queues: list[SimpleQueue[_Item]] = [SimpleQueue() for _ in range(workers)]
        self._threads = [
            threading.Thread(
                target=self._work, args=(queue,), name=f"pgsignals-worker-{number}", daemon=True
            )
            for number, queue in enumerate(self._queues)
        ]

    @property
    def depth(self) -> int:
        """Events that wait for a worker or are with one."""
        return self._depth

    @property
    def full(self) -> bool:
        """Whether the queue has no room."""
        return self._depth >= self._queue_size

    def start(self) -> None:
        """Start the workers."""
        for thread in self._threads:
            thread.start()

    def submit(self, message: Message) -> None:
        """Queue a message's events. Never waits: look at ``full`` first."""
        events = [Event(message, number, row) for number, row in enumerate(message.rows)]
        with self._room:
            self._depth += len(events)
        if len(self._queues) == 1:
            self._queues[0].put(events)
            return
        if message.moved:
            for event in events:
                self._submit_moved(event)
            return
        width = len(message.topic.key)
        shares: dict[int, list[Event]] = {}
        for event in events:
            shares.setdefault(self._worker_of(event._row[:width]), []).append(event)
        for number, share in shares.items():
            self._queues[number].put(share)

    def _submit_moved(self, event: Event) -> None:
        """A record that changes its key has two; the new one's worker waits for the old one's."""
        width = len(event._message.topic.key)
        new = self._worker_of(event._row[:width])
        old = self._worker_of(event._row[width : 2 * width])
        self._queues[old].put([event])
        if new != old:
            handled = threading.Event()
            self._queues[old].put(handled.set)
            self._queues[new].put(handled.wait)

    def _worker_of(self, key: tuple[object, ...]) -> int:
        return hash(hashable(key)) % len(self._queues)

    def announce(self, call: Callable[[], None]) -> None:
        """Have ``call`` made once, before anything that is submitted later is handled."""
        once = _Once(call)
        for queue in self._queues:
            queue.put(once)

    def settle(self, call: Callable[[], None]) -> None:
        """Have ``call`` made once all that was submitted before is handled."""
        last = _Last(call, len(self._queues))
        for queue in self._queues:
            queue.put(last)

    def wait_for_room(self, timeout: float) -> bool:
        """Wait until the queue is half empty; whether it is, within ``timeout`` seconds."""
        with self._room:
            return self._room.wait_for(lambda: self._depth <= self._queue_size // 2, timeout)

    def stop(self, timeout: float) -> bool:
        """End the workers once the queue is empty; whether they ended within ``timeout`` seconds.

        After that, no further receiver is called.
        """
        deadline = time.monotonic() + timeout
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        for broadcaster in self._broadcasters:
            broadcaster.close()
        return not any(
            thread.is_alive() and thread is not threading.current_thread()
            for thread in self._threads
        )

    def _work(self, queue: SimpleQueue[_Item]) -> None:
        while (item := queue.get()) is not None:
            if isinstance(item, list):
                self._handle(item)
            else:
                item()

    def _handle(self, events: list[Event]) -> None:
        for broadcaster in self._broadcasters:
            try:
                broadcaster.publish(events)
            except Exception:
                log.exception("%s could not take %d events", broadcaster, len(events))
        with self._room:
            self._depth -= len(events)
            if self._depth <= self._queue_size // 2:
                self._room.notify_all()
