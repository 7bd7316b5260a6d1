"""The broadcaster that is always there: it calls the receivers of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..core.events import Event, Gap
from ..core.metrics import Tracer
from .calls import CallScope
from .queues import Hold, current
from .registry import Registry, Subscription

FailureHandler = Callable[[Any, Event, BaseException], None]


class InProcess:
    """Calls each receiver of each event; one that raises is reported and stops nobody.

    With ``isolating``, the worker that publishes has its queue make the calls, so that another
    thread can go on with them behind a slow receiver.
    """

    def __init__(
        self,
        registry: Registry,
        failed: FailureHandler,
        isolating: bool = False,
        tracer: Tracer | None = None,
    ) -> None:
        self._registry = registry
        self._failed = failed
        self._isolating = isolating
        self._scope = CallScope(registry.around, tracer)
        self._closed = False

    def publish(self, events: Sequence[Event]) -> None:
        """Call the receivers of ``events``, which are of one topic, then the observers."""
        calls = self._calls(events)
        if self._isolating and (queue := current.queue) is not None:
            queue.make(self, calls)
            return
        call = self.call
        for event, receiver in calls:
            call(receiver, event)

    def _calls(self, events: Sequence[Event]) -> Iterator[tuple[Event, Any]]:
        calls = self._registry.calls(events)
        # A generator that has ended does not keep receivers alive, which blinker holds weakly; a
        # product does.
        return (each for each in calls) if self._isolating else calls

    def hold(self, receiver: Any, event: Event) -> Hold | None:
        """Return None, since nothing is acknowledged here."""
        return None

    def call(self, receiver: Any, event: Event, held: Any = None) -> None:
        """Call one receiver, unless this is closed or the receiver's subscription cancelled."""
        ours = type(receiver) is Subscription
        if self._closed or (ours and not receiver.active):
            return
        fn = receiver.fn if ours else receiver
        try:
            if not (self._scope.plain or (ours and receiver.collects)):
                with self._scope.enter([event], fn):
                    receiver(event._message.topic.model, event=event)
            elif ours:
                # Without blinker's wrapper: one call less for each event.
                fn(event)
            else:
                fn(event._message.topic.model, event=event)
        # SystemExit, too: it would end the thread, and leave the program deaf.
        except BaseException as error:
            self._failed(fn, event, error)

    def is_alone(self, receiver: Any) -> bool:
        """Whether nobody but the receiver listens to anything."""
        return self._registry.is_alone(receiver)

    def flush(self, timeout: float) -> bool:
        """Return True, since ``publish`` leaves nothing under way."""
        return True

    def announce(self, gap: Gap) -> None:
        """Do nothing, since the Hub itself tells the receivers of this process."""

    def close(self) -> None:
        """Begin no further call."""
        self._closed = True
