"""The base of all deliveries, which a Hub runs between ``start`` and ``stop``.

A delivery has a source, whose sink it is, a dispatcher, and the receivers.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from ..core.events import Event, Gap, Message
from ..core.metrics import Meter
from ..dispatch.dispatcher import Dispatcher
from ..dispatch.durable_in_process import DurableInProcess
from ..dispatch.forwarder import Forwarder
from ..dispatch.in_process import InProcess
from ..outbox.inspection import read_outbox
from ..postgres.connection import opened
from ..postgres.notification_queue import read_queue_usage
from ..sources.durable import DurableSource
from ..sources.notify import NotifySource
from ..triggers.inspection import read_foreign, read_states
from .callbacks import Callbacks
from .options import Options
from .status import Health, Status


class Lifecycle(Protocol):
    """A delivery as the Hub sees it, from ``start`` to ``stop``."""

    def start(self) -> None:
        """Deliver events from now on. If this raises, the Hub calls ``stop``."""

    def stop(self, timeout: float) -> bool:
        """Deliver what has arrived, then end; return whether that took at most ``timeout`` s."""

    def abandon(self) -> None:
        """In the child of a fork, give up what is inherited, without touching the parent's."""

    def settle(self, call: Callable[[], None]) -> None:
        """Make ``call`` once everything committed by now has been handled."""

    def status(self) -> Status:
        """Return the status of the Hub and its database."""

    def health(self) -> Health:
        """Return the health of the Hub, without asking the database."""


class Working(Protocol):
    """Something with threads that go on until it is stopped."""

    @property
    def failure(self) -> str:
        """The error that has ended one of the threads; empty if there was none."""


class Reading(Working, Protocol):
    """Something that reads events, and counts them since its start."""

    @property
    def is_alive(self) -> bool:
        """Whether the thread reads, or connects again."""

    @property
    def is_connected(self) -> bool:
        """Whether events can be read now."""

    @property
    def received(self) -> int:
        """The number of events that have come."""

    invalid: int
    reconnects: int


class Delivery(Lifecycle):
    """The way of events from one source to the receivers and backends of a Hub.

    With ``retries``, receivers that raise are called again. Without workers there are no receivers:
    events only go on to ``backends``.
    """

    # The reason, in health, when a thread hangs or has ended without an error.
    _hangs = "the thread that reads has ended"

    def __init__(
        self,
        options: Options,
        callbacks: Callbacks,
        meter: Meter,
        retries: DurableInProcess | None,
        *,
        now: Callable[[], datetime],
        backends: Sequence[Forwarder] = (),
    ) -> None:
        self._options = options
        self._callbacks = callbacks
        self._meter = meter
        self._retries = retries
        self._receiving = options.workers > 0
        self._backends = backends
        self._lag = Lag(now)
        registry, failed = callbacks.registry, callbacks.tell_failure
        self.dispatcher = Dispatcher(
            [self._lag, retries or InProcess(registry, failed, options.isolating, options.tracer)],
            max(1, options.workers),
            options.queue_size,
            callbacks.tell_gap,
            lambda count: meter.count("shed_events", count),
            # Receivers that are called again must get all events that are not acknowledged.
            sheds=retries is None,
        )

    def start(self) -> None:
        if self._receiving:
            self.dispatcher.start()
            if self._retries is not None:
                self._retries.start()
            self._callbacks.timer.start(self._options.isolating)
        for backend in self._backends:
            backend.start()

    def stop(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        self._stop_reading(timeout)
        self._callbacks.timer.drain()
        drained = self.dispatcher.stop(left())
        self._callbacks.timer.stop(left())
        self._close(left())
        for backend in self._backends:
            drained = backend.stop(left()) and drained
        return drained

    @abstractmethod
    def _stop_reading(self, timeout: float) -> None:
        """Stop the sources from reading on; events in flight can still be acknowledged."""

    @abstractmethod
    def _close(self, timeout: float) -> None:
        """Close the source's session, after receivers have returned."""

    def abandon(self) -> None:
        for backend in self._backends:
            backend.abandon()

    @property
    @abstractmethod
    def _sources(self) -> Sequence[Reading]:
        """The sources that read for the receivers or, without workers, for the backends."""

    @property
    def _working(self) -> list[Working]:
        """All objects whose threads have to go on."""
        receiving: list[Working] = [self.dispatcher, self._callbacks.timer]
        if self._retries is not None:
            receiving.append(self._retries)
        return [*self._reading, *(receiving if self._receiving else ()), *self._backends]

    @property
    def _reading(self) -> Sequence[Reading]:
        """All objects whose threads read, for receivers or backends."""
        return self._sources

    @property
    def _active(self) -> bool:
        """Whether this process reads, rather than standing by for another one."""
        return True

    @property
    def _aside(self) -> tuple[str, ...]:
        """The names of the receivers that have queues of their own."""
        return self.dispatcher.aside

    @property
    def _unacknowledged(self) -> int:
        """The number of events that are in flight."""
        return 0

    @property
    def _missing(self) -> str:
        """Why some events do not arrive; empty if all do."""
        return ""

    def status(self) -> Status:
        sources, dispatcher, retries = self._sources, self.dispatcher, self._retries
        return Status(
            watchers=(),
            namespace="",
            queue_usage=0.0,
            running=True,
            connected=all(each.is_connected for each in sources),
            depth=dispatcher.depth,
            oldest=dispatcher.oldest,
            received=sum(each.received for each in sources),
            invalid=sum(each.invalid for each in sources),
            shed=dispatcher.shed,
            reconnects=sum(each.reconnects for each in sources),
            aside=self._aside,
            name=self._options.name,
            active=self._active,
            unacknowledged=self._unacknowledged,
            retrying=0 if retries is None else retries.retrying,
            backends=tuple(each.status for each in self._backends),
        )

    def health(self) -> Health:
        dispatcher = self.dispatcher
        failure = next(filter(None, (each.failure for each in self._working)), "")
        alive = not failure and all(each.is_alive for each in self._reading)
        connected = all(each.is_connected for each in self._sources)
        if not alive:
            reason = failure or self._hangs
        elif not connected:
            reason = "the connection is lost, and being made again"
        elif self._callbacks.registry.coroutines.waits_in_vain:
            reason = "the event loop of the coroutine receivers does not run"
        elif missing := self._missing:
            reason = f"events are missing: {missing}"
        elif too_slow := dispatcher.aside_full:
            reason = f"receivers are too slow, and their events are dropped: {', '.join(too_slow)}"
        elif dispatcher.shedding:
            reason = "receivers are too slow, and events are dropped"
        else:
            reason = ""
        return Health(
            alive=alive,
            ready=not reason,
            connected=connected,
            reason=reason,
            depth=dispatcher.depth,
            oldest=dispatcher.oldest,
            lag=self._lag.seconds,
            aside=self._aside,
            backends=tuple(each.status for each in self._backends),
        )

    @property
    def full(self) -> bool:
        """See Sink."""
        return self.dispatcher.full

    def wait_for_room(self, timeout: float) -> bool:
        """See Sink."""
        return self.dispatcher.wait_for_room(timeout)

    def connected(self) -> None:
        """See Sink."""
        self.dispatcher.announce(self._callbacks.tell_connected)

    def disconnected(self, error: BaseException) -> None:
        """See Sink."""
        self.dispatcher.announce(lambda: self._callbacks.tell_disconnected(error))


class DatabaseDelivery(Delivery):
    """A delivery whose events come from a database, with triggers there."""

    @property
    @abstractmethod
    def _sources(self) -> Sequence[NotifySource | DurableSource]: ...

    @property
    def _missing(self) -> str:
        return next(filter(None, (each.triggers.reason for each in self._sources)), "")

    def status(self) -> Status:
        options = self._options
        counts: Counter[int] = Counter()
        for source in self._sources:
            counts.update(source.foreign)
        watchers, resolvers, namespace = options.watchers, options.resolvers, options.namespace
        with opened(options.dsn) as cursor:
            states = read_states(
                cursor, watchers, resolvers, namespace, options.transport, options.capture
            )
            return replace(
                super().status(),
                watchers=tuple(states),
                namespace=namespace,
                queue_usage=read_queue_usage(cursor),
                outbox=read_outbox(cursor) if options.transport.durable else None,
                foreign=read_foreign(cursor, counts),
            )


class Lag:
    """A broadcaster that only notes how old events are, by the server's clock."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self._handled: tuple[float, Message] | None = None

    @property
    def seconds(self) -> float:
        """The age of the latest event when it was handed over."""
        if self._handled is None:
            return 0.0
        # Computed here, not for each event, for which it would take longer than all else.
        at, message = self._handled
        return max(0.0, (self._now() - message.at).total_seconds() - (time.monotonic() - at))

    def publish(self, events: Sequence[Event]) -> None:
        """See Broadcaster."""
        self._handled = time.monotonic(), events[0]._message

    def flush(self, timeout: float) -> bool:
        """See Broadcaster."""
        return True

    def announce(self, gap: Gap) -> None:
        """See Broadcaster."""

    def close(self) -> None:
        """See Broadcaster."""
