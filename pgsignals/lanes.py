"""What waits for a worker, and for a receiver that is too slow to share one."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from queue import SimpleQueue
from types import MethodType
from typing import Any, Protocol

from .events import Event, Message
from .receivers import Subscription, receiver_name

Job = Callable[[], object]
# What is queued: with the number of events that it counts for; None is the end.
Item = tuple[int, "Job | Sequence[Event]"] | None


class Backlog:
    """What one thread has to do.

    ``full`` from ``size`` events on until half of them are done; ``given_up`` while what does not
    fit is dropped, ``lost`` the messages of the first and last that was. The dispatcher's lock
    guards all of it.
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
        # A datetime for each of what may be very many would cost more than all the rest.
        self.lost = (
            at if at.at_us < since.at_us else since,
            at if at.at_us > until.at_us else until,
        )


class Aside(Backlog):
    """What a receiver that proved slow has yet to be called with, beside the worker of ``lane``.

    ``slow_at`` is when a call was last slow; ``ended`` says that the worker calls it again.
    A record that changes its key leaves one lane for another, while events of it may still wait
    here: ``marker`` is set once all that is queued by now is done, and ``awaits`` has the markers,
    of other lanes, that come before what is queued from now on.
    """

    def __init__(self, lane: Lane, key: Hashable, name: str) -> None:
        super().__init__(lane.size, f"the receiver {name} was too slow")
        self.lane = lane
        self.key = key
        self.name = name
        self.slow_at = time.monotonic()
        self.ended = False
        self.marker: threading.Event | None = None
        self.awaits: dict[Aside, threading.Event] = {}

    def put(self, count: int, work: Job | Sequence[Event]) -> None:
        self.marker = None
        super().put(count, work)


class Caller(Protocol):
    """Calls receivers, one after the other."""

    def call(self, receiver: Any, event: Event) -> None:
        """Call a receiver with an event."""

    def is_alone(self, receiver: Any) -> bool:
        """Whether nobody else listens, so that it may be as slow as it likes."""


class Replaced(BaseException):
    """Unwinds a thread whose slow call has ended: another has taken over its lane."""

    def __init__(self, key: Hashable) -> None:
        super().__init__(key)
        self.key = key


class Lane(Backlog):
    """What a worker has to do, on view so that another thread can go on behind a slow receiver.

    ``jobs`` and the calls of ``make`` are iterators: the next thread goes on where the one that is
    stuck in a call has left them. ``running`` has that call's receiver under a number that no
    other call of the lane has; whoever takes it from there, the thread at the end of the call or
    another before that, owns the lane from then on.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.jobs: Iterator[Job] = iter(())
        self.running: dict[int, Any] = {}
        self.number = 0
        self.asides: dict[Hashable, Aside] = {}
        self.divert: Callable[[Aside, Any, Event], bool]
        self.caller: Caller
        self.resume: Job
        self.attempt: Callable[..., None]

    def make(self, caller: Caller, calls: Iterator[tuple[Any, Event]]) -> None:
        """Make the calls, those of receivers set aside by way of their queues."""
        self.caller = caller
        self.resume = functools.partial(self.make, caller, calls)
        call, running, asides, number = caller.call, self.running, self.asides, self.number
        for receiver, event in calls:
            if (
                asides
                and (aside := asides.get(receiver_key(receiver))) is not None
                and self.divert(aside, receiver, event)
            ):
                continue
            number += 1
            running[number] = receiver
            call(receiver, event)
            try:
                del running[number]
            except KeyError:
                raise Replaced(receiver_key(receiver)) from None
        self.number = number


class _Current(threading.local):
    lane: Lane | None = None


current = _Current()


def receiver_key(receiver: Any) -> Hashable:
    """What stays the same of a receiver over its calls: blinker makes bound methods anew.

    A blinker receiver is not kept alive by it, since blinker holds it weakly.
    """
    if type(receiver) is Subscription:
        return receiver
    if isinstance(receiver, MethodType):
        return id(receiver.__func__), id(receiver.__self__)
    return id(receiver)


class Once:
    """A call that the first worker to reach it makes, while the others wait for ``made``."""

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
        """Wait for so many more, of whom none has reached it."""
        with self._lock:
            self._left += threads

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._call()


def aside_of(lane: Lane, receiver: Any) -> Aside:
    """A queue for a receiver that proves slow in this lane."""
    return Aside(lane, receiver_key(receiver), receiver_name(receiver))
