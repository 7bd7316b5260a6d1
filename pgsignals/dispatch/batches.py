"""``on_batch``: collects events, and delivers the latest one of each record once in a while."""

from __future__ import annotations

import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..core.events import Batch, Event, hashable
from .calls import PLAIN, CallScope
from .delays import DelayQueue
from .registry import DEFAULT_RETRYING, Retrying, called

BatchReceiver = Callable[[Batch], object]
BatchFailureHandler = Callable[[Any, Event, BaseException], None]


class Keeper(Protocol):
    """Hears what becomes of a batch's events, by the object ``held`` that each came with."""

    def release(self, helds: Sequence[Any]) -> None:
        """Note that the receiver has taken these events."""

    def batch_failed(
        self,
        batcher: Batcher,
        batch: Batch,
        helds: Sequence[Any],
        error: BaseException,
    ) -> None:
        """Note that the receiver raised with ``batch``, which stands for those of ``helds``."""


# How many records beyond one full batch a batch receiver may be behind before its worker waits.
SPARE = 10_000


class Batcher:
    """Collects events for one receiver; log lines and errors give it the receiver's name.

    While it holds ``SPARE`` records more than a full batch, a worker that brings another waits, so
    that a slow batch receiver is treated like any slow receiver.
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
        self.every = every
        self._max_size = max_size
        self._timer = timer
        self._room = threading.Condition()
        self._latest: dict[Any, Event] = {}
        self._kept: dict[Any, list[Any]] = {}
        self._keeper: Keeper | None = None
        self._anonymous = itertools.count()
        timer.add(self)

    def forked(self) -> None:
        """In the child of a fork: forget what the parent collected."""
        self._room = threading.Condition()
        self._latest = {}
        self._kept = {}

    def keep(self, event: Event, keeper: Keeper, held: object) -> None:
        """Take an event, and tell ``keeper``, by ``held``, what becomes of it."""
        self._keeper = keeper
        self(event, held)

    def wake(self) -> None:
        """Wake the workers that wait for room, which then look again whether they have to."""
        with self._room:
            self._room.notify_all()

    def _has_room(self) -> bool:
        return len(self._latest) < self._max_size + SPARE or not self._timer.bounding

    def __call__(self, event: Event, held: object = None) -> None:
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
            if held is not None:
                self._kept.setdefault(key, []).append(held)
            full = len(self._latest) >= self._max_size
        if full:
            self._timer.schedule(self, 0.0)
        elif first:
            self._timer.schedule(self, self.every)

    def flush(self, failed: BatchFailureHandler, scope: CallScope = PLAIN) -> None:
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
            behind = [h for key in keys[at : at + self._max_size] for h in kept.get(key, ())]
            try:
                self.call(batch, scope)
            except BaseException as error:
                failed(self.fn, batch.events[-1], error)
                if self._keeper is not None:
                    self._keeper.batch_failed(self, batch, behind, error)
            else:
                if self._keeper is not None:
                    self._keeper.release(behind)

    def call(self, batch: Batch, scope: CallScope = PLAIN) -> None:
        """Call the receiver with a batch."""
        token = called.set(self.fn)
        try:
            with scope.enter(batch.events, self.fn):
                self.fn(batch)
        finally:
            called.reset(token)


class BatchTimer(DelayQueue[Batcher]):
    """The thread that calls batch receivers when their time has come, each within ``scope``.

    With ``parallel``, each receiver is called in a thread of its own, so that none waits for
    another.
    """

    def __init__(self, failed: BatchFailureHandler) -> None:
        super().__init__("batches", "batch", self._call, lambda batcher: batcher)
        self.scope = PLAIN
        self._failed = failed
        self._draining = False
        self._batchers: weakref.WeakSet[Batcher] = weakref.WeakSet()

    @property
    def bounding(self) -> bool:
        """Whether batchers bound what they keep: more is coming, and the thread makes room."""
        return self.running and not self._draining

    def add(self, batcher: Batcher) -> None:
        """Add a batcher, which ``drain`` wakes, and whose lock is renewed after a fork."""
        self._batchers.add(batcher)

    def forked(self) -> None:
        super().forked()
        for batcher in self._batchers:
            batcher.forked()

    def start(self, parallel: bool = False) -> None:
        self._draining = False
        super().start(parallel)

    def drain(self) -> None:
        """Let batchers take all that has arrived without waiting, since no more is coming."""
        self._draining = True
        for batcher in list(self._batchers):
            batcher.wake()

    def stop(self, timeout: float) -> None:
        """Flush what is collected and end the thread, waiting at most ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        super().stop(timeout)
        # A receiver that stops the Hub is not waited for.
        self.wait(max(0.0, deadline - time.monotonic()))

    def _call(self, batcher: Batcher) -> None:
        batcher.flush(self._failed, self.scope)
