"""The broadcaster that is always there: it calls the receivers of this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..events import Event, Gap
from ..metrics import Tracer, span
from ..receivers import Registry, Subscription, receiver_name

log = logging.getLogger("pgsignals")

FailureHandler = Callable[[Any, Event, BaseException], None]


class InProcess:
    """Calls each receiver of each event; one that raises is reported and stops nobody."""

    def __init__(self, registry: Registry, failed: FailureHandler) -> None:
        self._registry = registry
        self._failed = failed
        self._closed = False

    def publish(self, events: Sequence[Event]) -> None:
        """Call the receivers of ``events``, which are of one topic, then the observers."""
        self._call_receivers(events)
        for observer in self._registry.observers:
            observer(events)

    def _call_receivers(self, events: Sequence[Event]) -> None:
        topic = events[0]._message.topic
        everybody, indexes = self._registry.receivers(topic)
        if not everybody and not indexes:
            return
        # Our own subscriptions are called without blinker's wrapper: one call less for each event.
        plain = [receiver for receiver in everybody if type(receiver) is Subscription]
        others = [receiver for receiver in everybody if type(receiver) is not Subscription]
        verbose = log.isEnabledFor(logging.DEBUG)
        for event in events:
            if self._closed:
                return
            receivers = plain
            for index in indexes:
                receivers = [*receivers, *index.find(event)]
            if verbose:
                log.debug(
                    "delivering %r to %d receivers",
                    event,
                    len(receivers) + len(others),
                    extra={"event_uid": event.uid, **topic.fields},
                )
            for receiver in receivers:
                if receiver.active:
                    try:
                        receiver.fn(event)
                    # A thread that ends by SystemExit would leave the program deaf.
                    except BaseException as error:
                        self._failed(receiver.fn, event, error)
            for receiver in others:
                try:
                    receiver(topic.model, event=event)
                except BaseException as error:
                    self._failed(receiver, event, error)

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

    def __init__(self, registry: Registry, failed: FailureHandler, tracer: Tracer) -> None:
        super().__init__(registry, failed)
        self._tracer = tracer

    def _call_receivers(self, events: Sequence[Event]) -> None:
        topic = events[0]._message.topic
        everybody, indexes = self._registry.receivers(topic)
        for event in events:
            for receiver in [*everybody, *(one for index in indexes for one in index.find(event))]:
                if self._closed:
                    return
                ours = isinstance(receiver, Subscription)
                if ours and not receiver.active:
                    continue
                fn = receiver.fn if ours else receiver
                try:
                    if ours and receiver.collects:
                        fn(event)
                    else:
                        with span(self._tracer, [event], receiver_name(fn)):
                            receiver(topic.model, event=event)
                except BaseException as error:
                    self._failed(fn, event, error)
