"""The queues of a dispatcher: bounded, under one lock, with a Gap for events that did not fit."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from queue import SimpleQueue
from types import MethodType
from typing import Any, Protocol

from ..core.events import Event, Gap, Message, hashable
from .registry import Subscription

Job = Callable[[], object]
# An entry of a queue: the number of events that it counts for, and a job or events; None ends it.
Item = tuple[int, "Job | Sequence[Event]"] | None


class Backlog:
    """The queue of one thread.

    It is ``full`` from ``size`` events on until half of them are done, and ``given_up`` while new
    events are dropped; ``lost`` has the messages of the first and last event that was. The
    dispatcher's lock guards all of it.
    """

    def __init__(self, size: int, complaint: str = "receivers were too slow") -> None:
        self.size = size
        self.complaint = complaint
        self.items: SimpleQueue[Item] = SimpleQueue()
        self.depth = 0
        self.arrivals: deque[float] = deque()
        self.full = False
        self.given_up = False
        self.lost: tuple[Message, Message] | None = None

    def put(self, count: int, work: Job | Sequence[Event]) -> None:
        self.depth += count
        self.full = self.full or self.depth >= self.size
        self.arrivals.append(time.monotonic())
        self.items.put((count, work))

    def done(self, count: int) -> None:
        self.depth -= count
        self.full = self.full and self.depth > self.size // 2
        self.arrivals.popleft()

    def drop(self, events: Sequence[Event]) -> None:
        at = events[0]._message
        since, until = self.lost or (at, at)
        # Messages, not datetimes: making one for each dropped event would cost more than all else.
        self.lost = (
            at if at.at_us < since.at_us else since,
            at if at.at_us > until.at_us else until,
        )

    def resumed(self, announced: threading.Event | None) -> None:
        """Go on, since there is room again; ``announced`` is set once the loss is announced."""


class IsolatedQueue(Backlog):
    """The queue of a receiver that proved slow, beside that of the ``worker``.

    ``slow_at`` is when a call was last slow; ``ended`` says that the worker calls it again.
    A record that changes its key leaves one worker for another, while events of it may still wait
    here. ``marker`` is set once everything queued by now is done. ``awaits`` has the markers of
    other workers' queues that must be set before what is queued from now on.
    """

    def __init__(self, worker: WorkerQueue, key: Hashable, name: str) -> None:
        super().__init__(worker.size, f"the receiver {name} was too slow")
        self.worker = worker
        self.key = key
        self.name = name
        self.slow_at = time.monotonic()
        self.ended = False
        # The hold on the event of the slow call by which the receiver was isolated.
        self.held: Hold | None = None
        self.marker: threading.Event | None = None
        self.awaits: dict[IsolatedQueue, threading.Event] = {}

    def put(self, count: int, work: Job | Sequence[Event]) -> None:
        self.marker = None
        super().put(count, work)

    def resumed(self, announced: threading.Event | None) -> None:
        # The workers announce the loss in the order of their queues; later calls wait for that.
        if announced is not None:
            self.items.put((0, announced.wait))
        for reached in self.awaits.values():
            if not reached.is_set():
                self.put(1, reached.wait)


class Hold(Protocol):
    """Keeps an event from being acknowledged before its receiver has taken it."""

    def release(self) -> None:
        """Note that the receiver has taken the event."""


class Caller(Protocol):
    """Calls receivers, one after the other."""

    def call(self, receiver: Any, event: Event, held: Any = None) -> None:
        """Call a receiver with an event; release ``held`` once the receiver has taken it."""

    def hold(self, receiver: Any, event: Event) -> Hold | None:
        """Keep the event from being acknowledged until it is taken, since its worker goes on."""

    def is_alone(self, receiver: Any) -> bool:
        """Whether the receiver is the only one, so that it holds up nobody."""


class Replaced(BaseException):
    """Unwinds a thread whose slow call has ended, since another thread has taken over its queue."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class WorkerQueue(Backlog):
    """The queue of a worker, which another thread can take over behind a slow receiver.

    ``jobs`` and the calls of ``make`` are iterators: a new thread goes on where the thread that is
    stuck in a call has left them. ``running`` has the event and receiver of that call, under a
    number of its own. The thread that removes the call from there owns the queue from then on: the
    thread of the call, at its end, or another one before. With one worker nobody looks at them.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.jobs: Iterator[Job] = iter(())
        self.running: dict[int, tuple[Event, Any]] = {}
        self.number = 0
        self.isolated: dict[Hashable, IsolatedQueue] = {}
        # By number, the calls that have lost the queue and have yet to end.
        self.left: dict[int, IsolatedQueue] = {}
        self.divert: Callable[[IsolatedQueue, Any, Event], bool]
        self.caller: Caller
        self.resume: Job
        self.attempt: Callable[..., None]

    def make(self, caller: Caller, calls: Iterator[tuple[Event, Any]]) -> None:
        """Make the calls; put those of isolated receivers into their queues."""
        self.caller = caller
        self.resume = functools.partial(self.make, caller, calls)
        call, running, isolated, number = caller.call, self.running, self.isolated, self.number
        for each in calls:
            event, receiver = each
            if (
                isolated
                and (queue := isolated.get(receiver_key(receiver))) is not None
                and self.divert(queue, receiver, event)
            ):
                continue
            number += 1
            running[number] = each
            call(receiver, event)
            try:
                del running[number]
            except KeyError:
                raise Replaced(number) from None
        self.number = number


class _Current(threading.local):
    queue: WorkerQueue | None = None


# The queue that this thread works on, if another thread may take it over.
current = _Current()


def receiver_key(receiver: Any) -> Hashable:
    """Return a key that a receiver keeps over its calls: blinker makes bound methods anew.

    The key does not keep a receiver alive, since blinker holds its receivers weakly.
    """
    if type(receiver) is Subscription:
        return receiver
    if isinstance(receiver, MethodType):
        return id(receiver.__func__), id(receiver.__self__)
    return id(receiver)


class _Once:
    """A call that the first worker to reach it makes, while the others wait until it is made."""

    def __init__(self, call: Job, made: threading.Event) -> None:
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


class Last:
    """A call that the last of several threads to reach it makes; nobody waits for it."""

    def __init__(self, call: Job, threads: int) -> None:
        self._call = call
        self._left = threads
        self._lock = threading.Lock()

    def expect(self, threads: int) -> None:
        """Wait for so many more threads, none of which has reached the call."""
        with self._lock:
            self._left += threads

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._call()


class Queues:
    """The queues of the workers, and of isolated receivers.

    The workers share ``queue_size`` among them. A source looks at ``full`` before it submits, and
    waits for room; if that takes too long, ``give_up`` has the events for workers without room
    dropped. When these have room again, ``announce_loss`` is called with a Gap before anything
    later. ``count_shed`` counts all that is dropped. Unless they shed (``sheds``), the queues of
    isolated receivers have no bounds of their own: the source bounds what is in flight.
    """

    def __init__(
        self,
        workers: int,
        queue_size: int,
        announce_loss: Callable[[Gap], object],
        count_shed: Callable[[int], None],
        sheds: bool,
    ) -> None:
        self._announce_loss = announce_loss
        self.count_shed = count_shed
        self._sheds = sheds
        # Taken for each message: the lock itself is cheaper than the condition around it.
        self.lock = threading.RLock()
        self.room = threading.Condition(self.lock)
        self.queues = [WorkerQueue(-(-queue_size // workers)) for _ in range(workers)]
        self.isolated: list[IsolatedQueue] = []
        self._barriers: weakref.WeakSet[threading.Event] = weakref.WeakSet()
        self.stopping = self._released = False
        self.shed = 0

    @property
    def depth(self) -> int:
        """The number of events that wait for, or are with, a worker or an isolated receiver."""
        return sum(backlog.depth for backlog in self.backlogs)

    @property
    def oldest(self) -> float:
        """Seconds since the oldest of these events arrived; 0 without any."""
        with self.lock:
            arrivals = [backlog.arrivals[0] for backlog in self.backlogs if backlog.arrivals]
        return time.monotonic() - min(arrivals) if arrivals else 0.0

    @property
    def full(self) -> bool:
        """Whether any worker has no room, and its events are not being dropped."""
        for queue in self.queues:  # noqa: SIM110 - a generator costs more than all the rest.
            if queue.full and not queue.given_up:
                return True
        return False

    @property
    def shedding(self) -> bool:
        """Whether events for a worker, or for an isolated receiver, are being dropped."""
        return any(backlog.given_up for backlog in self.backlogs)

    @property
    def idle(self) -> bool:
        """Whether a worker has nothing to do."""
        return any(not queue.depth for queue in self.queues)

    @property
    def backlogs(self) -> list[Backlog]:
        """All queues."""
        return [*self.queues, *self.isolated]

    def queue_of(self, key: tuple[object, ...]) -> WorkerQueue:
        """The queue of the worker that handles events of a record."""
        try:
            number = hash(key)
        # A value made by a typecaster of the user's may raise anything.
        except Exception:
            number = hash(hashable(key))
        return self.queues[number % len(self.queues)]

    def put(self, queue: WorkerQueue, events: Sequence[Event]) -> None:
        """Queue events for a worker, or drop them if its queue is given up; with the lock held."""
        if queue.given_up:
            self.drop(queue, events)
        else:
            queue.put(len(events), events)

    def drop(self, backlog: Backlog, events: Sequence[Event]) -> None:
        """Drop events; with the lock held."""
        backlog.drop(events)
        self.shed += len(events)

    def has_to_shed(self, queue: IsolatedQueue) -> bool:
        """Whether events for an isolated receiver have to be dropped."""
        return self._sheds and queue.full and not self.stopping

    def done(self, backlog: Backlog, count: int) -> None:
        """Count so many events as handled."""
        if not count:
            return
        with self.lock:
            was_full = backlog.full
            backlog.done(count)
            if was_full and not backlog.full:
                self._resume(backlog)
                self.room.notify_all()

    def wait_for_room(self, timeout: float) -> bool:
        """Wait until full queues are half empty; return whether they are within ``timeout`` s."""
        with self.room:
            return self.room.wait_for(lambda: not self.full, timeout)

    def give_up(self) -> None:
        """Drop the events for workers without room until they have room again."""
        with self.lock:
            for queue in self.queues:
                queue.given_up = queue.full

    def _resume(self, backlog: Backlog) -> None:
        """Take events again, once the loss is announced; with the lock held."""
        was_given_up, backlog.given_up = backlog.given_up, False
        lost, backlog.lost = backlog.lost, None
        announced = None
        if lost is not None:
            since, until = lost
            gap = Gap(since.at, until.at, "overflow", backlog.complaint)
            announced = self.announce(functools.partial(self._announce_loss, gap))
        if was_given_up:
            backlog.resumed(announced)

    def announce(self, call: Job) -> threading.Event:
        """Make ``call`` once, before anything that is submitted later is handled.

        The event that is returned is set then.
        """
        with self.lock:
            made = self.barrier()
            once = _Once(call, made)
            for queue in self.queues:
                queue.items.put((0, once))
        return made

    def barrier(self) -> threading.Event:
        """Return an event that one queue's thread sets and another's waits for."""
        barrier = threading.Event()
        self._barriers.add(barrier)
        if self._released:
            barrier.set()
        return barrier
