"""From messages to receivers: bounded queues, workers, order per record."""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from queue import SimpleQueue

from .broadcasters import Broadcaster
from .events import Event, Gap, Message, hashable

log = logging.getLogger("pgsignals")


class _Once:
    """A call that the first worker to reach it makes, while the others wait for ``made``."""

    def __init__(self, call: Callable[[], None], made: threading.Event) -> None:
        self._call = call
        self._made = made
        self._taken = threading.Lock()

    def __call__(self) -> None:
        if not self._taken.acquire(blocking=False):
            self._made.wait()
            return
        try:
            self._call()
        finally:
            self._made.set()


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


class _Lane:
    """What one worker has to do: calls, each with the number of events that it counts for.

    ``full`` from ``size`` events on until half of them are done; ``given_up`` while what does not
    fit is dropped, ``lost`` the times of the first and last event that were. The dispatcher's lock
    guards all of it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: SimpleQueue[tuple[int, Callable[[], object]] | None] = SimpleQueue()
        self.depth = 0
        self.arrivals: deque[float] = deque()
        self.full = False
        self.given_up = False
        self.lost: tuple[datetime, datetime] | None = None

    def put(self, count: int, call: Callable[[], object]) -> None:
        self.depth += count
        self.full = self.full or self.depth >= self.size
        self.arrivals.append(time.monotonic())
        self.calls.put((count, call))

    def done(self, count: int) -> None:
        self.depth -= count
        self.full = self.full and self.depth > self.size // 2
        self.arrivals.popleft()


class Dispatcher:
    """Hands events to the broadcasters from worker threads.

    Events of one record are handled by one worker, in order. The workers share ``queue_size``
    among them. Whoever submits looks at ``full``, and waits for room; where that takes too long,
    ``give_up`` drops what is for the workers that have none, and ``announce_loss`` is called with a
    Gap, before anything later, when they have room again.
    """

    def __init__(
        self,
        broadcasters: Sequence[Broadcaster],
        workers: int,
        queue_size: int,
        announce_loss: Callable[[Gap], None] = lambda gap: None,
    ) -> None:
        self._broadcasters = tuple(broadcasters)
        self._announce_loss = announce_loss
        self._room = threading.Condition()
        self._barriers: weakref.WeakSet[threading.Event] = weakref.WeakSet()
        self._lanes = [_Lane(-(-queue_size // workers)) for _ in range(workers)]
        self._threads = [
            threading.Thread(
                target=self._work, args=(lane,), name=f"pgsignals-worker-{number}", daemon=True
            )
            for number, lane in enumerate(self._lanes)
        ]
        self.shed = 0

    @property
    def depth(self) -> int:
        """Events that wait for a worker or are with one."""
        return sum(lane.depth for lane in self._lanes)

    @property
    def oldest(self) -> float:
        """Seconds since the oldest of these arrived; 0 without any."""
        with self._room:
            arrivals = [lane.arrivals[0] for lane in self._lanes if lane.arrivals]
        return time.monotonic() - min(arrivals) if arrivals else 0.0

    @property
    def full(self) -> bool:
        """Whether a worker that is not given up has no room."""
        return any(lane.full and not lane.given_up for lane in self._lanes)

    @property
    def shedding(self) -> bool:
        """Whether events for a worker are being dropped."""
        return any(lane.given_up for lane in self._lanes)

    @property
    def idle(self) -> bool:
        """Whether a worker has nothing to do."""
        return any(not lane.depth for lane in self._lanes)

    def start(self) -> None:
        """Start the workers."""
        for thread in self._threads:
            thread.start()

    def submit(self, message: Message) -> None:
        """Queue a message's events. Never waits: look at ``full`` first."""
        events = [Event(message, number, row) for number, row in enumerate(message.rows)]
        if len(self._lanes) == 1:
            with self._room:
                self._put(self._lanes[0], events)
        elif message.moved:
            with self._room:
                for event in events:
                    self._put_moved(event)
        else:
            width = len(message.topic.key)
            shares: dict[_Lane, list[Event]] = {}
            for event in events:
                shares.setdefault(self._lane_of(event._row[:width]), []).append(event)
            with self._room:
                for lane, share in shares.items():
                    self._put(lane, share)

    def _put(self, lane: _Lane, events: list[Event]) -> None:
        if lane.given_up:
            self._drop(lane, events)
        else:
            lane.put(len(events), functools.partial(self._handle, events))

    def _put_moved(self, event: Event) -> None:
        """A record that changes its key has two; the new one's worker waits for the old one's."""
        width = len(event._message.topic.key)
        new = self._lane_of(event._row[:width])
        old = self._lane_of(event._row[width : 2 * width])
        if new is old or old.given_up:
            self._put(old, [event])
        elif new.given_up:
            self._drop(new, [event])
        else:
            handled = self._barrier()
            self._put(old, [event])
            old.calls.put((0, handled.set))
            # It counts as an event, since a record's moves may fill a queue too.
            new.put(1, handled.wait)

    def _drop(self, lane: _Lane, events: list[Event]) -> None:
        at = events[0].at
        since, until = lane.lost or (at, at)
        lane.lost = min(since, at), max(until, at)
        self.shed += len(events)

    def _lane_of(self, key: tuple[object, ...]) -> _Lane:
        return self._lanes[hash(hashable(key)) % len(self._lanes)]

    def _barrier(self) -> threading.Event:
        barrier = threading.Event()
        self._barriers.add(barrier)
        return barrier

    def announce(self, call: Callable[[], None]) -> None:
        """Have ``call`` made once, before anything that is submitted later is handled."""
        with self._room:
            once = _Once(call, self._barrier())
            for lane in self._lanes:
                lane.calls.put((0, once))

    def settle(self, call: Callable[[], None]) -> None:
        """Have ``call`` made once all that was submitted before is handled."""
        last = _Last(call, len(self._lanes))
        for lane in self._lanes:
            lane.calls.put((0, last))

    def wait_for_room(self, timeout: float) -> bool:
        """Wait until full queues are half empty; whether they are, within ``timeout`` seconds."""
        with self._room:
            return self._room.wait_for(lambda: not self.full, timeout)

    def give_up(self) -> None:
        """Drop, from now on, what is for workers without room, until they have room again."""
        with self._room:
            for lane in self._lanes:
                lane.given_up = lane.full

    def _resume(self, lane: _Lane) -> None:
        """Take events for the worker again, once its loss is announced."""
        lane.given_up = False
        lost, lane.lost = lane.lost, None
        if lost is not None:
            gap = Gap(*lost, "overflow", "receivers were too slow")
            self.announce(functools.partial(self._announce_loss, gap))

    def stop(self, timeout: float) -> bool:
        """End the workers once the queue is empty; whether they ended within ``timeout`` seconds.

        After that, no further receiver is called. When a worker calls it, what is queued is left,
        and other workers only end the call that they are in.
        """
        deadline = time.monotonic() + timeout
        with self._room:
            for lane in self._lanes:
                self._resume(lane)
                lane.calls.put(None)
        if threading.current_thread() in self._threads:
            self._close()
            # Who waits for the one that calls this would be waited for here.
            for barrier in list(self._barriers):
                barrier.set()
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        self._close()
        return not any(
            thread.is_alive() and thread is not threading.current_thread()
            for thread in self._threads
        )

    def _close(self) -> None:
        broadcasters, self._broadcasters = self._broadcasters, ()
        for broadcaster in broadcasters:
            broadcaster.close()

    def _work(self, lane: _Lane) -> None:
        while (item := lane.calls.get()) is not None:
            count, call = item
            call()
            if not count:
                continue
            with self._room:
                was_full = lane.full
                lane.done(count)
                if was_full and not lane.full:
                    self._resume(lane)
                    self._room.notify_all()

    def _handle(self, events: list[Event]) -> None:
        for broadcaster in self._broadcasters:
            try:
                broadcaster.publish(events)
            except Exception:
                log.exception(
                    "%s could not take %d events",
                    broadcaster,
                    len(events),
                    extra=events[0]._message.topic.fields,
                )
