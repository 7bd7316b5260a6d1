"""In-process delivery that acknowledges: a receiver that raises is called again, then given up."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..batches import Batcher
from ..events import Batch, Event, Gap, hashable
from ..metrics import Tracer, span
from ..receivers import (
    DEFAULT_RETRYING,
    Registry,
    Retrying,
    Subscription,
    called,
    receiver_name,
)
from .inprocess import FailureHandler

log = logging.getLogger("pgsignals")


@dataclass(frozen=True)
class Failed:
    """An event that a receiver could not take: ``error`` is that of the last of ``tries``."""

    receiver: str
    event: Event
    error: BaseException
    tries: int

    @property
    def trace(self) -> str:
        """The error with its traceback, as text."""
        return "".join(traceback.format_exception(self.error))


# Has a failed event kept, and calls the function once it is.
Bury = Callable[[Failed, Callable[[], None]], None]
# What stands between an event and the receiver: the receiver, the record, and the source's reign.
_Place = tuple[int, Any, int]


@dataclass
class _Attempt:
    """A call that is to be made again; ``events`` is what it counts for, ``given`` what it gets.

    ``queued``: it stands in the queues of its places. ``scheduled``: it has a time.
    """

    receiver: Any
    call: Callable[[], object]
    given: Sequence[Event]
    events: Sequence[Event]
    policy: Retrying
    places: tuple[_Place, ...] = ()
    tries: int = 0
    delivered: Callable[[], None] | None = None
    queued: bool = False
    scheduled: bool = False

    @property
    def stale(self) -> bool:
        return any(e._message.page is not None and e._message.page.reign.over for e in self.events)

    def release(self) -> None:
        _release(self.events)


class DurableInProcess:
    """Calls each receiver of each event; the event's page is held while one has yet to take it."""

    def __init__(
        self,
        registry: Registry,
        failed: FailureHandler,
        bury: Bury,
        tracer: Tracer | None = None,
        *,
        fate: str = "kept as a dead letter",
    ) -> None:
        self._registry = registry
        self._fate = fate
        self._failed = failed
        self._bury = bury
        self._tracer = tracer
        self._closed = False
        self._condition = threading.Condition()
        self._due: list[tuple[float, int, _Attempt]] = []
        self._order = itertools.count()
        # Whoever is the first in all its places is tried again, the others wait. Two places are
        # those of an update that changes a key: of the record that it was, and that it is.
        self._waiting: dict[_Place, deque[_Attempt]] = {}
        self._thread: threading.Thread | None = None

    @property
    def retrying(self) -> int:
        """Calls that wait to be made again, or behind one that does."""
        with self._condition:
            queued = {id(each) for queue in self._waiting.values() for each in queue}
            return len(queued | {id(each) for _, _, each in self._due})

    def publish(self, events: Sequence[Event]) -> None:
        """Call the receivers of ``events``, which are of one topic."""
        everybody, indexes = self._registry.receivers(events[0]._message.topic)
        if everybody or indexes:
            for event in events:
                if self._closed:
                    # Not delivered: it must not be acknowledged either.
                    event._message.page.hold()
                    continue
                if event._message.page.reign.holds():
                    for receiver in everybody:
                        self._give(receiver, event)
                    for index in indexes:
                        for receiver in index.find(event):
                            self._give(receiver, event)
        for observer in self._registry.observers:
            observer(events)

    def _give(self, receiver: Any, event: Event) -> None:
        if self._waiting and self._waits(receiver, event):
            return
        if type(receiver) is Subscription:
            if not receiver.active:
                return
            if receiver.collects:
                self._collect(receiver, event)
                return
        try:
            self._call(receiver, event)
        # A thread that ends by SystemExit would leave the program deaf.
        except BaseException as error:
            self._failed(_function(receiver), event, error)
            self._hold([event])
            self._try_again(self._attempt(receiver, event), error)

    def _collect(self, receiver: Subscription, event: Event) -> None:
        if isinstance(receiver.fn, Batcher):
            self._hold([event])
            receiver.fn.keep(event, self)
            return
        try:
            receiver.fn(event)
        except BaseException as error:
            self._failed(receiver.fn, event, error)

    def _call(self, receiver: Any, event: Event) -> None:
        token = called.set(receiver)
        try:
            if self._tracer is None:
                receiver(event._message.topic.model, event=event)
            else:
                with span(self._tracer, [event], receiver_name(receiver)):
                    receiver(event._message.topic.model, event=event)
        finally:
            called.reset(token)

    def _attempt(self, receiver: Any, event: Event) -> _Attempt:
        policy = _policy(receiver)
        places = _places(receiver, event)
        return _Attempt(
            receiver, lambda: self._call(receiver, event), [event], [event], policy, places
        )

    def _waits(self, receiver: Any, event: Event) -> bool:
        """Whether the event has to wait for an earlier one of its record, and then have it wait."""
        places = _places(receiver, event)
        with self._condition:
            if not any(place in self._waiting for place in places):
                return False
            self._hold([event])
            self._queue(self._attempt(receiver, event))
            return True

    def _queue(self, attempt: _Attempt) -> None:
        attempt.queued = True
        for place in attempt.places:
            self._waiting.setdefault(place, deque()).append(attempt)

    def _try_again(self, attempt: _Attempt, error: BaseException) -> None:
        """Have the call made again later, or give it up."""
        attempt.tries += 1
        if attempt.tries <= attempt.policy.retries:
            self._schedule(attempt, attempt.policy.delay(attempt.tries))
            return
        left = len(attempt.given)

        def buried() -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                attempt.release()

        name = receiver_name(attempt.receiver)
        for event in attempt.given:
            log.error(
                "the receiver %s has failed %d times with event %s, which is %s",
                name,
                attempt.tries,
                event.uid,
                self._fate,
                extra={"receiver": name, "event_uid": event.uid, **event._message.topic.fields},
            )
            self._bury(Failed(name, event, error, attempt.tries), buried)
        self._next(attempt)

    def _schedule(self, attempt: _Attempt, delay: float) -> None:
        with self._condition:
            if not attempt.queued:
                self._queue(attempt)
            self._push(attempt, delay)

    def _push(self, attempt: _Attempt, delay: float) -> None:
        attempt.scheduled = True
        heapq.heappush(self._due, (time.monotonic() + delay, next(self._order), attempt))
        self._condition.notify_all()

    def _is_first(self, attempt: _Attempt) -> bool:
        return all(self._waiting[place][0] is attempt for place in attempt.places)

    def _next(self, attempt: _Attempt) -> None:
        """The attempt is over: what waited for it alone is next."""
        if not attempt.queued:
            return
        with self._condition:
            followers: list[_Attempt] = []
            for place in attempt.places:
                queue = self._waiting[place]
                queue.popleft()
                if queue:
                    followers.append(queue[0])
                else:
                    del self._waiting[place]
            for follower in followers:
                if not follower.scheduled and self._is_first(follower):
                    self._push(follower, 0.0)

    def release(self, events: Sequence[Event]) -> None:
        """See Keeper."""
        _release(events)

    def batch_failed(
        self, batcher: Batcher, batch: Batch, events: Sequence[Event], error: BaseException
    ) -> None:
        """See Keeper."""

        def call() -> None:
            batcher.call(batch, self._tracer)

        self._try_again(_Attempt(batcher, call, batch.events, events, batcher.retrying), error)

    def redeliver(
        self,
        event: Event,
        receiver: str,
        tries: int,
        delivered: Callable[[], None],
    ) -> bool:
        """Call the one receiver of this name with the event, soon; whether there is such a one."""
        everybody, indexes = self._registry.receivers(event._message.topic)
        for index in indexes:
            everybody += index.find(event)
        for found in everybody:
            if receiver_name(found) == receiver:
                self._schedule(self._again(found, event, tries, delivered), 0.0)
                return True
        return False

    def _again(
        self, receiver: Any, event: Event, tries: int, delivered: Callable[[], None]
    ) -> _Attempt:
        fn = _function(receiver)

        def call() -> None:
            if isinstance(fn, Batcher):
                fn.call(Batch((event,)), self._tracer)
            else:
                self._call(receiver, event)

        once = Retrying(retries=0)
        return _Attempt(receiver, call, [event], [], once, tries=tries, delivered=delivered)

    def start(self) -> None:
        """Start the thread that calls again."""
        self._thread = threading.Thread(target=self._run, name="pgsignals-retries", daemon=True)
        self._thread.start()

    def flush(self, timeout: float) -> bool:
        """See Broadcaster: pages tell what is under way."""
        return True

    def announce(self, gap: Gap) -> None:
        """See Broadcaster: the Hub calls the receivers of Gaps."""

    def close(self) -> None:
        """Begin no further call; what has not been taken is not acknowledged."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._condition.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._closed:
                    return
                _, _, attempt = heapq.heappop(self._due)
                attempt.scheduled = False
                if not self._is_first(attempt):
                    continue
            if not attempt.stale:
                self._make(attempt)
            else:
                self._next(attempt)

    def _make(self, attempt: _Attempt) -> None:
        if type(attempt.receiver) is Subscription and not attempt.receiver.active:
            attempt.release()
            self._next(attempt)
            return
        try:
            attempt.call()
        except BaseException as error:
            self._failed(_function(attempt.receiver), attempt.given[-1], error)
            self._try_again(attempt, error)
            return
        attempt.release()
        if attempt.delivered is not None:
            attempt.delivered()
        self._next(attempt)

    @staticmethod
    def _hold(events: Sequence[Event]) -> None:
        for event in events:
            event._message.page.hold()


def _release(events: Sequence[Event]) -> None:
    for event in events:
        if event._message.page is not None:
            event._message.page.release()


def _function(receiver: Any) -> Any:
    return receiver.fn if isinstance(receiver, Subscription) else receiver


def _policy(receiver: Any) -> Retrying:
    return receiver.retrying if type(receiver) is Subscription else DEFAULT_RETRYING


def _places(receiver: Any, event: Event) -> tuple[_Place, ...]:
    """What later events of the record wait in, if they have to wait."""
    if _policy(receiver).later != "wait":
        return ()
    message = event._message
    topic, row = message.topic, event._row
    width = len(topic.key)
    keys = [row[:width], row[width : 2 * width]] if message.moved else [row[:width]]
    return tuple(
        dict.fromkeys(
            (
                id(_function(receiver)),
                (topic.schema, topic.table, hashable(key)),
                id(message.page.reign),
            )
            for key in keys
        )
    )
