"""``on_batch``: the latest event of each record, once in a while."""

from __future__ import annotations

import functools
import heapq
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .events import Batch, Event, hashable
from .metrics import Tracer, span
from .receivers import DEFAULT_RETRYING, Retrying, called, receiver_name

BatchReceiver = Callable[[Batch], object]
BatchFailureHandler = Callable[[Any, Event, BaseException], None]


class Keeper(Protocol):
    """Who has to know what becomes of the events of a batch."""

    def release(self, events: Sequence[Event]) -> None:
        """They have been taken care of."""

    def batch_failed(
        self,
        batcher: Batcher,
        batch: Batch,
        events: Sequence[Event],
        error: BaseException,
    ) -> None:
        """The receiver raised with ``batch``, which stands for ``events``."""


# What a batch receiver may be behind with, beyond one full batch, before its worker waits for it.
SPARE = 10_000


class Batcher:
    """Collects events for one receiver, whose name it goes by in messages.

    When it holds ``SPARE`` records more than a batch has room for, whoever brings another waits: to
    a batch receiver that is too slow happens what happens to any that is.
    """

    def __init__(
        self,
        fn: BatchReceiver,
        every: float,
        max_size: int,
        timer: BatchTimer,
        retrying: Retrying = DEFAULT_RETRYING,
    ) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.retrying = retrying
        self._every = every
        self._max_size = max_size
        self._timer = timer
        self._room = threading.Condition()
        self._latest: dict[Any, Event] = {}
        self._kept: dict[Any, list[Event]] = {}
        self._keeper: Keeper | None = None
        self._anonymous = itertools.count()
        timer.add(self)

    def forked(self) -> None:
        """In the child of a fork: forget what the parent collected."""
        self._room = threading.Condition()
        self._latest = {}
        self._kept = {}

    def keep(self, event: Event, keeper: Keeper) -> None:
        """Take an event, and tell ``keeper`` what becomes of it."""
        self._keeper = keeper
        self(event, kept=True)

    def wake(self) -> None:
        """Have those who wait for room look whether they still have to."""
        with self._room:
            self._room.notify_all()

    def _has_room(self) -> bool:
        return len(self._latest) < self._max_size + SPARE or not self._timer.bounding

    def __call__(self, event: Event, kept: bool = False) -> None:
        """Take an event, in place of an earlier one of the same record."""
        message = event._message
        record = hashable(event._row[: len(message.topic.key)]) or next(self._anonymous)
        key = (message.topic.schema, message.topic.table, record)
        with self._room:
            if key not in self._latest:
                self._room.wait_for(self._has_room)
            first = not self._latest
            self._latest.pop(key, None)
            self._latest[key] = event
            if kept:
                self._kept.setdefault(key, []).append(event)
            full = len(self._latest) >= self._max_size
        if full:
            self._timer.schedule(self, 0.0)
        elif first:
            self._timer.schedule(self, self._every)

    def flush(self, failed: BatchFailureHandler, tracer: Tracer | None = None) -> None:
        """Call the receiver with what was collected, if anything was."""
        with self._room:
            latest, self._latest = self._latest, {}
            kept, self._kept = self._kept, {}
            self._room.notify_all()
        if not latest:
            return
        keys, events = tuple(latest), tuple(latest.values())
        for at in range(0, len(events), self._max_size):
            batch = Batch(events[at : at + self._max_size])
            behind = [e for key in keys[at : at + self._max_size] for e in kept.get(key, ())]
            try:
                self.call(batch, tracer)
            except BaseException as error:
                failed(self.fn, batch.events[-1], error)
                if self._keeper is not None:
                    self._keeper.batch_failed(self, batch, behind, error)
            else:
                if self._keeper is not None:
                    self._keeper.release(behind)

    def call(self, batch: Batch, tracer: Tracer | None = None) -> None:
        """Call the receiver."""
        token = called.set(self.fn)
        try:
            with span(tracer, batch.events, receiver_name(self.fn)):
                self.fn(batch)
        finally:
            called.reset(token)


class BatchTimer:
    """The thread that calls batch receivers when their time has come, in a span of ``tracer``."""

    def __init__(self, failed: BatchFailureHandler) -> None:
        self.tracer: Tracer | None = None
        self._failed = failed
        self._condition = threading.Condition()
        self._due: list[tuple[float, int, Batcher]] = []
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._draining = False
        self._batchers: weakref.WeakSet[Batcher] = weakref.WeakSet()

    @property
    def bounding(self) -> bool:
        """Whether more is coming than may be kept, and the thread is there that makes room."""
        return self._thread is not None and not self._draining

    def add(self, batcher: Batcher) -> None:
        """Look after a batcher's lock, too, in a fork."""
        self._batchers.add(batcher)

    def forked(self) -> None:
        """In the child of a fork: what was collected is the parent's to deliver."""
        self._condition = threading.Condition()
        self._due = []
        self._thread = None
        for batcher in self._batchers:
            batcher.forked()

    def schedule(self, batcher: Batcher, delay: float) -> None:
        """Flush ``batcher`` in ``delay`` seconds."""
        with self._condition:
            heapq.heappush(self._due, (time.monotonic() + delay, next(self._order), batcher))
            self._condition.notify()

    def flush(self) -> None:
        """Call, in this thread, every receiver that has collected something."""
        with self._condition:
            due, self._due = self._due, []
        for _, _, batcher in sorted(due):
            batcher.flush(self._failed, self.tracer)

    def start(self) -> None:
        """Start the thread."""
        self._draining = False
        self._thread = threading.Thread(target=self._run, name="pgsignals-batches", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Have batchers take all that has arrived, without waiting: no more is coming."""
        self._draining = True
        for batcher in list(self._batchers):
            batcher.wake()

    def stop(self, timeout: float) -> None:
        """Flush what is collected and end the thread, waiting at most ``timeout`` seconds."""
        with self._condition:
            thread, self._thread = self._thread, None
            self._condition.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        # A receiver may stop and start the timer: then another thread has taken over from this one.
        own = threading.current_thread()
        while True:
            with self._condition:
                while self._thread is own and (not self._due or self._due[0][0] > time.monotonic()):
                    self._condition.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if not self._due:
                    return
                _, _, batcher = heapq.heappop(self._due)
            batcher.flush(self._failed, self.tracer)
