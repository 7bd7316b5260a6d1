"""One run of a Hub, from start to stop: the source, the dispatcher, and what is between them."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Literal, Protocol

from psycopg2.extensions import cursor as Cursor

from .batches import BatchTimer
from .broadcasters import Broadcaster
from .broadcasters.inprocess import FailureHandler, InProcess, TracedInProcess
from .broadcasters.outlet import Outlet
from .connection import connect
from .dispatch import Dispatcher
from .errors import ConfigurationError
from .events import Event, Gap, Message
from .inspection import Health, Status, read_queue_usage, read_states
from .metrics import Meter, Tracer
from .plugins import load_plugins
from .receivers import Registry
from .resolvers import BUILTIN
from .sources.notify import NotifySource, Timing
from .tables import Resolver
from .triggers.definitions import Definition, define
from .triggers.installer import Limits, check, install, prune
from .watchers import Watcher

log = logging.getLogger("pgsignals")

Install = Literal["auto", "check", "off"]


class Run(Protocol):
    """What exists between ``start`` and ``stop``."""

    def start(self) -> None:
        """Deliver events from now on. When it raises, ``stop`` is called."""

    def stop(self, timeout: float) -> bool:
        """Deliver what has arrived, then end; whether that took less than ``timeout`` seconds."""

    def abandon(self) -> None:
        """Called in the child of a fork: give up what is inherited, and leave the parent's be."""

    def settle(self, call: Callable[[], None]) -> None:
        """Have ``call`` made once all that is committed by now has been handled."""

    def status(self) -> Status:
        """How things stand."""

    def health(self) -> Health:
        """How things stand, without asking the database."""


@dataclass(frozen=True)
class Settings:
    """What ``start`` was told; see :meth:`pgsignals.Hub.start`."""

    dsn: str = field(repr=False)
    listen_dsn: str = field(repr=False)
    watchers: tuple[Watcher, ...]
    resolvers: Sequence[Resolver]
    namespace: str
    install: Install
    prune: bool
    limits: Limits
    timing: Timing
    workers: int
    queue_size: int
    tracer: Tracer | None = None
    backends: Sequence[Callable[[], Broadcaster]] = ()
    # Of each of them, or of none.
    backend_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audience:
    """Whom a run tells what: the Hub's receivers and signals."""

    registry: Registry
    timer: BatchTimer
    failed: FailureHandler
    gap: Callable[[Gap], bool]
    connected: Callable[[], None]
    disconnected: Callable[[BaseException], None]


def all_resolvers(first: Sequence[Resolver]) -> tuple[Resolver, ...]:
    """``first``, those of the installed plugins, and the built-in ones."""
    return (*first, *load_plugins().resolvers(), *BUILTIN)


def in_process(audience: Audience, tracer: Tracer | None, isolating: bool = False) -> InProcess:
    """The broadcaster that is always there."""
    if tracer is None:
        return InProcess(audience.registry, audience.failed, isolating)
    return TracedInProcess(audience.registry, audience.failed, tracer, isolating)


class DatabaseRun:
    """Events from the database: prepares its source, and is its sink."""

    def __init__(self, settings: Settings, audience: Audience, meter: Meter) -> None:
        self._settings = settings
        self._audience = audience
        self._definitions: list[Definition] = []
        self._problem: ConfigurationError | None = None
        self._pruned = not settings.prune
        self._awaited: dict[str, Callable[[], None]] = {}
        self._meter = meter
        self._lag = Lag(lambda: self.source.now())
        self._outlets = [
            Outlet(make(), settings.queue_size, meter, audience.gap) for make in settings.backends
        ]
        # With one worker all calls are made one after the other, which is what that promises.
        isolating = settings.workers > 1
        broadcasters: list[Broadcaster] = [
            self._lag,
            in_process(audience, settings.tracer, isolating),
        ]
        self.dispatcher = Dispatcher(
            broadcasters,
            settings.workers,
            settings.queue_size,
            audience.gap,
            lambda count: meter.count("shed_events", count),
        )
        self.source = NotifySource(
            settings.dsn, settings.listen_dsn, self, self, settings.timing, self._meter
        )

    def start(self) -> None:
        """See Run."""
        self.source.start()
        self.dispatcher.start()
        self._audience.timer.start()
        for outlet in self._outlets:
            outlet.start()

    def stop(self, timeout: float) -> bool:
        """See Run."""
        deadline = time.monotonic() + timeout
        self.source.stop(timeout)
        self._audience.timer.drain()
        drained = self.dispatcher.stop(max(0.0, deadline - time.monotonic()))
        self._audience.timer.stop(max(0.0, deadline - time.monotonic()))
        for outlet in self._outlets:
            drained = outlet.stop(max(0.0, deadline - time.monotonic())) and drained
        return drained

    def abandon(self) -> None:
        """See Run."""
        self.source.abandon()

    def settle(self, call: Callable[[], None]) -> None:
        """See Run."""
        marker = secrets.token_hex(8)
        self._awaited[marker] = call
        connection = connect(self._settings.dsn)
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_notify(%s, %s)", (self.source.own_channel, marker))
        finally:
            connection.close()

    def status(self) -> Status:
        """See Run."""
        settings = self._settings
        connection = connect(settings.dsn)
        try:
            with connection.cursor() as cursor:
                states = read_states(
                    cursor, settings.watchers, settings.resolvers, settings.namespace
                )
                usage = read_queue_usage(cursor)
        finally:
            connection.close()
        return Status(
            watchers=tuple(states),
            namespace=settings.namespace,
            queue_usage=usage,
            running=True,
            connected=self.source.is_connected,
            depth=self.dispatcher.depth,
            oldest=self.dispatcher.oldest,
            received=self.source.received,
            invalid=self.source.invalid,
            shed=self.dispatcher.shed,
            aside=self.dispatcher.aside,
            reconnects=self.source.reconnects,
            backends=tuple(outlet.status for outlet in self._outlets),
        )

    def health(self) -> Health:
        """See Run."""
        alive, connected = self.source.is_alive, self.source.is_connected
        shedding, too_slow = self.dispatcher.shedding, self.dispatcher.aside_full
        if not alive:
            reason = "the thread that listens has ended or hangs"
        elif not connected:
            reason = "the connection is lost, and being made again"
        elif too_slow:
            reason = f"receivers are too slow, and their events are dropped: {', '.join(too_slow)}"
        elif shedding:
            reason = "receivers are too slow, and events are dropped"
        else:
            reason = ""
        return Health(
            alive=alive,
            ready=not reason,
            connected=connected,
            reason=reason,
            depth=self.dispatcher.depth,
            oldest=self.dispatcher.oldest,
            lag=self._lag.seconds,
            backends=tuple(outlet.status for outlet in self._outlets),
        )

    def define(self, cursor: Cursor) -> list[Definition]:
        """Resolve the watchers; after the first time, a table that changed is no reason to stop."""
        settings = self._settings
        self._problem = None
        try:
            definitions = define(cursor, settings.watchers, settings.resolvers, settings.namespace)
            self._audience.registry.bind([definition.topic for definition in definitions])
        except ConfigurationError as error:
            if not self._definitions:
                raise
            log.error("the watchers no longer fit the database: %s", error)
            self._problem = error
        else:
            self._definitions = definitions
            for definition in definitions:
                self._meter.count("events", 0, **definition.topic.fields)
        return self._definitions

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """See that the triggers are there, as far as the settings allow."""
        settings = self._settings
        triggers = [definition.trigger for definition in definitions]
        if self._problem is not None:
            now = datetime.now(timezone.utc)
            self.gap(Gap(now, now, "watcher_broken", str(self._problem)))
        elif settings.install == "auto":
            install(cursor, settings.namespace, triggers, settings.limits)
            if not self._pruned:
                prune(cursor, settings.namespace, triggers, limits=settings.limits)
                self._pruned = True
        elif settings.install == "check":
            check(cursor, settings.namespace, triggers)

    @property
    def full(self) -> bool:
        """See Sink."""
        return self.dispatcher.full

    @property
    def idle(self) -> bool:
        """See Sink."""
        return self.dispatcher.idle

    def submit(self, message: Message) -> None:
        """See Sink."""
        if self._outlets:
            # Past the dispatcher: slow receivers are no reason for a broker to miss events.
            events = [Event(message, number, row) for number, row in enumerate(message.rows)]
            for outlet in self._outlets:
                outlet.publish(events)
        self.dispatcher.submit(message)
        self._meter.count("events", len(message.rows), **message.topic.fields)

    def wait_for_room(self, timeout: float) -> bool:
        """See Sink."""
        return self.dispatcher.wait_for_room(timeout)

    def give_up(self) -> None:
        """See Sink."""
        self.dispatcher.give_up()

    def gap(self, gap: Gap) -> None:
        """See Sink."""
        for outlet in self._outlets:
            outlet.announce(gap)
        self.dispatcher.announce(lambda: self._audience.gap(gap))

    def connected(self) -> None:
        """See Sink."""
        self.dispatcher.announce(self._audience.connected)

    def disconnected(self, error: BaseException) -> None:
        """See Sink."""
        self.dispatcher.announce(lambda: self._audience.disconnected(error))

    def reached(self, marker: str) -> None:
        """See Sink."""
        if (call := self._awaited.pop(marker, None)) is not None:
            self.dispatcher.settle(call)


class Lag:
    """A broadcaster that takes events nowhere: it sees how old they are by the server's clock."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self._handled: tuple[float, Message] | None = None

    @property
    def seconds(self) -> float:
        """How old the latest event was when it was handed over."""
        if self._handled is None:
            return 0.0
        # Worked out here, since it would take longer than all else on an event's way.
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
