"""In-process delivery that acknowledges: calls receivers that raise again, up to their retries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..core.events import Batch, Event
from ..core.metrics import Tracer
from .batches import Batcher
from .held_events import Held, Ledger
from .in_process import FailureHandler, InProcess
from .registry import Registry, Retrying, Subscription, called, receiver_name
from .retries import Attempt, GiveUp, Retries, function, places_of, policy
from .retries import Failed as Failed


class DurableInProcess(InProcess):
    """Calls each receiver of each event, and holds the event's page until all have taken it.

    With ``isolating``, other receivers go on behind a slow one (see InProcess), and calls are made
    again beside one another, one at a time for each receiver. The ``ledger`` has the events that
    receivers have yet to take.
    """

    def __init__(
        self,
        registry: Registry,
        failed: FailureHandler,
        give_up: GiveUp,
        tracer: Tracer | None = None,
        *,
        ledger: Ledger,
        isolating: bool = False,
        fate: str = "kept as a dead letter",
    ) -> None:
        super().__init__(registry, failed, isolating, tracer)
        self.ledger = ledger
        self._retries = Retries(failed, give_up, fate)

    @property
    def retrying(self) -> int:
        """The number of calls that wait to be made again, or behind one that does."""
        return self._retries.count

    @property
    def failure(self) -> str:
        """The error that has ended the thread that calls again; empty if there was none."""
        return self._retries.failure

    def start(self) -> None:
        """Start the thread that calls again."""
        self._retries.start(self._isolating)

    def _calls(self, events: Sequence[Event]) -> Iterator[tuple[Event, Any]]:
        calls, park = self._registry.calls(events), self.ledger.park
        return (each for each in calls if not park(each[1], each[0])) if self._isolating else calls

    def hold(self, receiver: Any, event: Event) -> Held:
        return self.ledger.hold(receiver, event)

    def call(self, receiver: Any, event: Event, held: Held | None = None) -> None:
        """See Caller. An event that is not delivered any more is not acknowledged either."""
        page = event._message.page
        if self._closed:
            if held is None:
                page.hold()
            return
        if not page.lease.holds() or (
            self._retries.waiting
            and self._retries.follow(receiver, event, lambda: self._attempt(receiver, event, held))
        ):
            return
        if type(receiver) is Subscription and (not receiver.active or receiver.collects):
            if receiver.active:
                self._collect(receiver, event, held)
            elif held is not None:
                held.release()
            return
        try:
            self._call(receiver, event)
        # SystemExit, too: it would end the thread, and leave the program deaf.
        except BaseException as error:
            self._failed(function(receiver), event, error)
            self._retries.again(self._attempt(receiver, event, held), error)
            return
        if held is not None:
            held.release()

    def _collect(self, receiver: Subscription, event: Event, held: Held | None) -> None:
        if isinstance(receiver.fn, Batcher):
            receiver.fn.keep(event, self, held or self.hold(receiver, event))
            return
        try:
            receiver.fn(event)
        except BaseException as error:
            self._failed(receiver.fn, event, error)
        if held is not None:
            held.release()

    def _call(self, receiver: Any, event: Event) -> None:
        token = called.set(receiver)
        try:
            if self._scope.plain:
                receiver(event._message.topic.model, event=event)
            else:
                with self._scope.enter([event], receiver):
                    receiver(event._message.topic.model, event=event)
        finally:
            called.reset(token)

    def _attempt(self, receiver: Any, event: Event, held: Held | None) -> Attempt:
        return Attempt(
            receiver,
            lambda: self._call(receiver, event),
            [event],
            [held or self.hold(receiver, event)],
            policy(receiver),
            places_of(receiver, event),
        )

    def release(self, helds: Sequence[Held]) -> None:
        """See Keeper."""
        for held in helds:
            held.release()

    def batch_failed(
        self, batcher: Batcher, batch: Batch, helds: Sequence[Held], error: BaseException
    ) -> None:
        """See Keeper."""

        def call() -> None:
            batcher.call(batch, self._scope)

        attempt = Attempt(batcher, call, batch.events, helds, batcher.retrying)
        self._retries.again(attempt, error)

    def redeliver(
        self,
        event: Event,
        receiver: str,
        tries: int,
        delivered: Callable[[], None],
    ) -> bool:
        """Call the receiver of this name with the event, soon; return whether there is one."""
        everybody, indexes = self._registry.receivers(event._message.topic)
        for index in indexes:
            everybody += index.find(event)
        for found in everybody:
            if receiver_name(found) == receiver:
                self._retries.begin(self._again(found, event, tries, delivered), 0.0)
                return True
        return False

    def _again(
        self, receiver: Any, event: Event, tries: int, delivered: Callable[[], None]
    ) -> Attempt:
        fn = function(receiver)

        def call() -> None:
            if isinstance(fn, Batcher):
                fn.call(Batch((event,)), self._scope)
            else:
                self._call(receiver, event)

        once = Retrying(retries=0)
        return Attempt(receiver, call, [event], [], once, tries=tries, delivered=delivered)

    def close(self) -> None:
        """Begin no further call; events that have not been taken stay unacknowledged."""
        super().close()
        self._retries.close(1.0)
