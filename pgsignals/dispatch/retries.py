"""Calls again, in durable delivery, the receivers that have raised."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.events import Event, hashable
from ..core.logging import log
from .delays import DelayQueue
from .held_events import Held
from .in_process import FailureHandler
from .registry import DEFAULT_RETRYING, Retrying, Subscription, event_text, receiver_name


@dataclass(frozen=True)
class Failed:
    """An event that a receiver could not take; ``error`` is that of the last of ``tries``."""

    receiver: str
    event: Event
    error: BaseException
    tries: int


# Has a failed event kept, and calls the function once it is.
GiveUp = Callable[[Failed, Callable[[], None]], None]
# A queue of attempts that have to keep their order: by receiver, record, and the source's lease.
_Place = tuple[int, Any, int]


@dataclass
class Attempt:
    """A call that is to be made again.

    ``given`` are the events that the receiver gets, ``helds`` those that are taken with them.
    ``queued``: it stands in the queues of its places. ``scheduled``: it has a time.
    """

    receiver: Any
    call: Callable[[], object]
    given: Sequence[Event]
    helds: Sequence[Held]
    policy: Retrying
    places: tuple[_Place, ...] = ()
    tries: int = 0
    delivered: Callable[[], None] | None = None
    queued: bool = False
    scheduled: bool = False

    @property
    def stale(self) -> bool:
        """Whether a lease is over, so that this process may not make the call any more."""
        return any(held.over for held in self.helds)

    def release(self) -> None:
        """Release the events of the attempt, which the receiver has taken, or never will."""
        for held in self.helds:
            held.release()


class Retries(DelayQueue[Attempt]):
    """Makes the attempts in the order of each record, and gives up those out of retries.

    With ``parallel``, attempts are made beside one another, one at a time for each receiver.
    """

    def __init__(self, failed: FailureHandler, give_up: GiveUp, fate: str) -> None:
        super().__init__("retries", "retry", self._take, lambda each: id(function(each.receiver)))
        self._failed = failed
        self._give_up = give_up
        self._fate = fate
        # An attempt is made once it is the first in all its places; the others wait. An update that
        # changes a key has two places: those of the former and of the new key.
        self.waiting: dict[_Place, deque[Attempt]] = {}

    @property
    def count(self) -> int:
        """The number of calls that wait to be made again, or behind one that does."""
        with self._condition:
            queued = {id(each) for queue in self.waiting.values() for each in queue}
            return len(queued | {id(each) for each in self.items})

    def follow(self, receiver: Any, event: Event, make: Callable[[], Attempt]) -> bool:
        """Queue the attempt of ``make`` behind earlier events of the record; False without any."""
        places = places_of(receiver, event)
        with self._condition:
            if not any(place in self.waiting for place in places):
                return False
            self._queue(make())
            return True

    def again(self, attempt: Attempt, error: BaseException) -> None:
        """Make a call that has raised ``error`` again later, or give it up."""
        attempt.tries += 1
        if attempt.tries <= attempt.policy.retries:
            self.begin(attempt, attempt.policy.delay(attempt.tries))
            return
        left = len(attempt.given)

        def kept() -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                attempt.release()

        name = receiver_name(attempt.receiver)
        for event in attempt.given:
            log.error(
                "the receiver %s has failed %d times with %s, which is %s",
                name,
                attempt.tries,
                event_text(event),
                self._fate,
                extra={"receiver": name, "event_uid": event.uid, **event._message.topic.fields},
            )
            self._give_up(Failed(name, event, error, attempt.tries), kept)
        self._next(attempt)

    def begin(self, attempt: Attempt, delay: float) -> None:
        """Make a call in ``delay`` seconds; later events of the record wait for it."""
        with self._condition:
            if not attempt.queued:
                self._queue(attempt)
            self._push(attempt, delay)

    def _queue(self, attempt: Attempt) -> None:
        attempt.queued = True
        for place in attempt.places:
            self.waiting.setdefault(place, deque()).append(attempt)

    def _push(self, attempt: Attempt, delay: float) -> None:
        attempt.scheduled = True
        self.schedule(attempt, delay)

    def _is_first(self, attempt: Attempt) -> bool:
        return all(self.waiting[place][0] is attempt for place in attempt.places)

    def _next(self, attempt: Attempt) -> None:
        """End the attempt, and schedule those that waited for it alone."""
        if not attempt.queued:
            return
        with self._condition:
            followers: list[Attempt] = []
            for place in attempt.places:
                queue = self.waiting[place]
                queue.popleft()
                if queue:
                    followers.append(queue[0])
                else:
                    del self.waiting[place]
            for follower in followers:
                if not follower.scheduled and self._is_first(follower):
                    self._push(follower, 0.0)

    def _take(self, attempt: Attempt) -> None:
        with self._condition:
            attempt.scheduled = False
            if not self._is_first(attempt):
                return
        if not attempt.stale:
            self._make(attempt)
        else:
            self._next(attempt)

    def _make(self, attempt: Attempt) -> None:
        if type(attempt.receiver) is Subscription and not attempt.receiver.active:
            attempt.release()
            self._next(attempt)
            return
        try:
            attempt.call()
        except BaseException as error:
            self._failed(function(attempt.receiver), attempt.given[-1], error)
            self.again(attempt, error)
            return
        attempt.release()
        if attempt.delivered is not None:
            attempt.delivered()
        self._next(attempt)


def function(receiver: Any) -> Any:
    """Return the function of a receiver, be it a subscription or blinker's."""
    return receiver.fn if isinstance(receiver, Subscription) else receiver


def policy(receiver: Any) -> Retrying:
    """Return the receiver's policy; for blinker's receivers, the default one."""
    return receiver.retrying if type(receiver) is Subscription else DEFAULT_RETRYING


def places_of(receiver: Any, event: Event) -> tuple[_Place, ...]:
    """Return the places in which later events of the record wait; none if they may follow."""
    if policy(receiver).later != "wait":
        return ()
    message = event._message
    topic, row = message.topic, event._row
    width = len(topic.key)
    keys = [row[:width], row[width : 2 * width]] if message.moved else [row[:width]]
    return tuple(
        dict.fromkeys(
            (
                id(function(receiver)),
                (topic.schema, topic.table, hashable(key)),
                id(message.page.lease),
            )
            for key in keys
        )
    )
