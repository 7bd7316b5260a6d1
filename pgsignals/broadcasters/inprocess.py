"""The broadcaster that is always there: it calls the receivers of this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..events import Event, Gap
from ..lanes import current
from ..metrics import Tracer, span
from ..receivers import Registry, Subscription, receiver_name

log = logging.getLogger("pgsignals")

FailureHandler = Callable[[Any, Event, BaseException], None]


class InProcess:
    """Calls each receiver of each event; one that raises is reported and stops nobody.

    Where it is ``isolating``, the worker that publishes lets its lane make the calls, so that
    another thread can go on with them behind a receiver that is slow.
    """

    def __init__(self, registry: Registry, failed: FailureHandler, isolating: bool = False) -> None:
        self._registry = registry
        self._failed = failed
        self._isolating = isolating
        self._closed = False

    def publish(self, events: Sequence[Event]) -> None:
        """Call the receivers of ``events``, which are of one topic, then the observers."""
        if self._isolating and (lane := current.lane) is not None:
            lane.make(self, self._calls(events))
        else:
            self._call_receivers(events)
            if self._registry.observers:
                self._tell_observers(events)

    def _tell_observers(self, events: Sequence[Event]) -> None:
        for observer in self._registry.observers:
            observer(events)

    def _call_receivers(self, events: Sequence[Event]) -> None:
        topic = events[0]._message.topic
        everybody, indexes = self._registry.receivers(topic)
        if not everybody and not indexes:
            return
        verbose = log.isEnabledFor(logging.DEBUG)
        for event in events:
            if self._closed:
                return
            receivers = everybody
            for index in indexes:
                receivers = [*receivers, *index.find(event)]
            if verbose:
                _log_delivery(event, len(receivers))
            for receiver in receivers:
                if type(receiver) is not Subscription:
                    try:
                        receiver(topic.model, event=event)
                    # A thread that ends by SystemExit would leave the program deaf.
                    except BaseException as error:
                        self._failed(receiver, event, error)
                # Without blinker's wrapper: one call less for each event.
                elif receiver.active:
                    try:
                        receiver.fn(event)
                    except BaseException as error:
                        self._failed(receiver.fn, event, error)

    def _calls(self, events: Sequence[Event]) -> Iterator[tuple[Any, Event]]:
        """What ``publish`` does, call by call, for whichever thread asks next."""
        everybody, indexes = self._registry.receivers(events[0]._message.topic)
        verbose = log.isEnabledFor(logging.DEBUG)
        if everybody or indexes:
            for event in events:
                receivers = everybody
                for index in indexes:
                    receivers = [*receivers, *index.find(event)]
                if verbose:
                    _log_delivery(event, len(receivers))
                for receiver in receivers:
                    yield receiver, event
        self._tell_observers(events)

    def call(self, receiver: Any, event: Event) -> None:
        """Call one receiver, unless this is closed or the receiver's subscription cancelled."""
        if self._closed:
            return
        if type(receiver) is Subscription:
            if receiver.active:
                try:
                    receiver.fn(event)
                except BaseException as error:
                    self._failed(receiver.fn, event, error)
        else:
            try:
                receiver(event._message.topic.model, event=event)
            except BaseException as error:
                self._failed(receiver, event, error)

    def is_alone(self, receiver: Any) -> bool:
        """Whether nobody but the receiver listens to anything."""
        return self._registry.is_alone(receiver)

    def flush(self, timeout: float) -> bool:
        """Nothing is ever under way after ``publish``."""
        return True

    def announce(self, gap: Gap) -> None:
        """Nothing: the Hub tells the receivers of this process by itself."""

    def close(self) -> None:
        """Begin no further call."""
        self._closed = True


class TracedInProcess(InProcess):
    """The same, with each call in a span; apart, so that without a tracer it costs nothing."""

    def __init__(
        self,
        registry: Registry,
        failed: FailureHandler,
        tracer: Tracer,
        isolating: bool = False,
    ) -> None:
        super().__init__(registry, failed, isolating)
        self._tracer = tracer

    def _call_receivers(self, events: Sequence[Event]) -> None:
        topic = events[0]._message.topic
        everybody, indexes = self._registry.receivers(topic)
        for event in events:
            for receiver in [*everybody, *(one for index in indexes for one in index.find(event))]:
                self.call(receiver, event)

    def call(self, receiver: Any, event: Event) -> None:
        """See InProcess."""
        ours = type(receiver) is Subscription
        if self._closed or (ours and not receiver.active):
            return
        fn = receiver.fn if ours else receiver
        try:
            if ours and receiver.collects:
                fn(event)
            else:
                with span(self._tracer, [event], receiver_name(fn)):
                    receiver(event._message.topic.model, event=event)
        except BaseException as error:
            self._failed(fn, event, error)


def _log_delivery(event: Event, receivers: int) -> None:
    log.debug(
        "delivering %r to %d receivers",
        event,
        receivers,
        extra={"event_uid": event.uid, **event._message.topic.fields},
    )
