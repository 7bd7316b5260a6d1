"""One run of a Hub in outbox delivery: the source, the receivers, and what is between them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from psycopg2.extensions import cursor as Cursor

from .backfills import Backfill
from .broadcasters.durable import DurableInProcess, Failed
from .connection import connect
from .dispatch import Dispatcher
from .errors import ConfigurationError, StateError, near
from .events import Event, Gap, Topic, model_name
from .inspection import Health, Status, read_queue_usage, read_states
from .metrics import Meter
from .outbox.backfill import request
from .outbox.housekeeping import Housekeeper
from .outbox.inspection import read_outbox
from .outbox.pages import Page
from .outbox.snapshots import SnapshotMessage
from .outbox.store import DeadLetter, Letter
from .preparing import DurablePreparer
from .relaying import Relay, relay_consumers
from .runs import Audience, Lag, Settings
from .sources.claims import Consumer
from .sources.outbox import OutboxSource
from .tailing import Tail

log = logging.getLogger("pgsignals")


class DurableRun:
    """Events from the outbox: has its sources, and is the sink of the receivers'.

    Without workers it has no consumer for receivers: events only go on to ``backends``.
    """

    def __init__(
        self, settings: Settings, audience: Audience, meter: Meter, consumer: Consumer
    ) -> None:
        self._settings = settings
        self._audience = audience
        self._meter = meter
        self._consumer = consumer
        self._was_active = False
        self._receiving = settings.workers > 0
        self._lag = Lag(lambda: self.source.now())
        self._receivers = DurableInProcess(
            audience.registry, audience.failed, self._bury, settings.tracer
        )
        self.dispatcher = Dispatcher(
            [self._lag, self._receivers],
            max(1, settings.workers),
            settings.queue_size,
            audience.gap,
        )
        broadcasters = [make() for make in settings.backends]
        relayed = relay_consumers(consumer, broadcasters, settings.backend_names)
        reading = [consumer, *relayed] if self._receiving else relayed
        self._preparer = DurablePreparer(
            settings,
            audience.registry,
            meter,
            [each.name for each in reading if each.name is not None],
        )
        self.source = OutboxSource(
            settings.dsn,
            settings.listen_dsn,
            self._preparer,
            self,
            settings.timing,
            meter,
            consumer,
            10 * settings.queue_size,
        )
        self._relays = [
            Relay(broadcaster, settings, self._preparer, own, meter)
            for broadcaster, own in zip(broadcasters, relayed, strict=True)
        ]
        self._housekeeper = Housekeeper(settings.dsn, settings.timing.timeout, self._tidy_triggers)
        self._tail: Tail | None = None
        self._tail_lock = threading.Lock()

    def start(self) -> None:
        """See Run."""
        if self._receiving:
            self.source.start()
            self.dispatcher.start()
            self._receivers.start()
            self._audience.timer.start()
        for relay in self._relays:
            relay.start()
        self._housekeeper.start()

    def stop(self, timeout: float) -> bool:
        """See Run."""
        deadline = time.monotonic() + timeout

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        self.source.pause()
        # All of them now: while one is waited for, the others would read on.
        for relay in self._relays:
            relay.pause()
        self._audience.timer.drain()
        drained = self.dispatcher.stop(left())
        self._audience.timer.stop(left())
        self.source.stop(left())
        for relay in self._relays:
            drained = relay.stop(left()) and drained
        self._housekeeper.stop(left())
        if self._tail is not None:
            self._tail.stop(left())
        return drained

    def abandon(self) -> None:
        """See Run."""
        self.source.abandon()
        for relay in self._relays:
            relay.abandon()
        self._housekeeper.abandon()
        if self._tail is not None:
            self._tail.abandon()

    def tail(self) -> Tail:
        """What reads the outbox for those who keep their places themselves; made when asked for.

        Raises ConnectError and the other kinds of DatabaseError.
        """
        with self._tail_lock:
            if self._tail is None:
                tail = Tail(
                    self._settings, lambda: self._preparer.definitions, self._preparer.decoders
                )
                try:
                    tail.start()
                except BaseException:
                    tail.stop(0)
                    raise
                self._tail = tail
            return self._tail

    def settle(self, call: Callable[[], None]) -> None:
        """See Run."""
        if not self._receiving:
            raise StateError("With workers=0 nothing is handled here: ask where events are read.")
        self.source.settle(lambda: self.dispatcher.settle(call))

    @property
    def _sources(self) -> list[OutboxSource]:
        """Those that read, for the receivers or else for the backends."""
        return [self.source] if self._receiving else [relay.source for relay in self._relays]

    def status(self) -> Status:
        """See Run."""
        settings = self._settings
        connection = connect(settings.dsn)
        try:
            with connection.cursor() as cursor:
                states = read_states(
                    cursor, settings.watchers, settings.resolvers, settings.namespace, durable=True
                )
                usage = read_queue_usage(cursor)
                outbox = read_outbox(cursor)
        finally:
            connection.close()
        return Status(
            watchers=tuple(states),
            namespace=settings.namespace,
            queue_usage=usage,
            running=True,
            connected=all(source.is_connected for source in self._sources),
            depth=self.dispatcher.depth,
            oldest=self.dispatcher.oldest,
            received=sum(source.received for source in self._sources),
            invalid=sum(source.invalid for source in self._sources),
            reconnects=sum(source.reconnects for source in self._sources),
            name=self._consumer.name,
            active=any(source.is_active for source in self._sources),
            retrying=self._receivers.retrying,
            unacknowledged=sum(source.outstanding for source in self._sources),
            outbox=outbox,
            backends=tuple(relay.status for relay in self._relays),
        )

    def health(self) -> Health:
        """See Run."""
        alive = all(source.is_alive for source in self._sources)
        connected = all(source.is_connected for source in self._sources)
        if not alive:
            reason = "the thread that reads the outbox has ended or hangs"
        elif not connected:
            reason = "the connection is lost, and being made again"
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
            backends=tuple(relay.status for relay in self._relays),
        )

    def backfill(self, target: Any, where: str | None, chunk: int, name: str | None) -> Backfill:
        """See :meth:`pgsignals.Hub.backfill`."""
        own = self._consumer.name
        if own is None:
            raise ConfigurationError(
                "backfill() is for a consumer with a name, by which it goes on after a crash: "
                'start(delivery="outbox", name=…).'
            )
        known = [relay.source.name for relay in self._relays]
        if self._receiving:
            known.insert(0, own)
        elif name is None:
            name = known[0] if len(known) == 1 else ""
        if name is not None and name not in known:
            raise ConfigurationError(
                f"name={name!r} is no consumer of this Hub{near(name, known)} They are "
                f"{', '.join(map(repr, known))}."
            )
        found, model = self._preparer.snapshot(target)
        topic = found.topic
        if name in (None, own) and not self.hears(topic):
            raise ConfigurationError(
                f"backfill({model_name(target)}): no receiver listens to its snapshots. Add "
                f"'snapshot' to one: @pgsignals.on({model_name(target)}, 'snapshot')."
            )
        connection = connect(self._settings.dsn)
        try:
            with connection.cursor() as cursor:
                number = request(
                    cursor,
                    name or own,
                    topic.schema,
                    topic.table,
                    topic.label,
                    model,
                    where,
                    chunk,
                )
        finally:
            connection.close()
        return Backfill(self._settings.dsn, number)

    def _tidy_triggers(self, cursor: Cursor) -> None:
        was_active = self._was_active
        self._was_active = any(source.is_active for source in self._sources)
        if self._was_active and not was_active:
            self._preparer.remove_former_triggers(cursor)

    @property
    def full(self) -> bool:
        """See DurableSink."""
        return self.dispatcher.full

    def submit_page(self, events: Sequence[Event], page: Page) -> None:
        """See DurableSink."""
        counts: dict[Topic, int] = {}
        for event in events:
            topic = event._message.topic
            counts[topic] = counts.get(topic, 0) + 1
        self.dispatcher.submit_events(events)
        self.dispatcher.settle(page.finish)
        for topic, count in counts.items():
            self._meter.count("events", count, **topic.fields)

    def gap(self, gap: Gap, page: Page | None = None) -> None:
        """See DurableSink."""

        def tell() -> None:
            # Where the reign is over, whoever reads on announces it.
            if page is None:
                self._audience.gap(gap)
            elif page.reign.holds() and self._audience.gap(gap):
                page.finish()

        self.dispatcher.announce(tell)

    def connected(self) -> None:
        """See DurableSink."""
        self.dispatcher.announce(self._audience.connected)

    def disconnected(self, error: BaseException) -> None:
        """See DurableSink."""
        self.dispatcher.announce(lambda: self._audience.disconnected(error))

    def redeliver(self, event: Event, letter: DeadLetter) -> bool:
        """See DurableSink."""
        return self._receivers.redeliver(
            event, letter.receiver, letter.attempts, lambda: self.source.unbury(letter.key)
        )

    def hears(self, topic: Topic) -> bool:
        """See DurableSink."""
        registry = self._audience.registry
        return any(registry.receivers(topic)) or bool(registry.observers)

    def _bury(self, failed: Failed, kept: Callable[[], None]) -> None:
        event = failed.event
        message = event._message
        error = f"{type(failed.error).__name__}: {failed.error}"
        letter = Letter(
            receiver=failed.receiver,
            uid=event.uid,
            channel=self.source.channel_of(event),
            number=event._number,
            id=message.sequence,
            payload="",
            error=error,
            traceback=failed.trace,
            attempts=failed.tries,
        )
        if isinstance(message, SnapshotMessage):
            # The outbox has no row of it.
            payload = message.letter(event._number)
            letter = replace(letter, number=0, id=None, payload=payload)
        self.source.bury(letter, kept)


def consumer_of(delivery: str, name: object, partitions: object, lease: object) -> Consumer | None:
    """Who reads the outbox; None in another delivery. Raises ConfigurationError."""
    if delivery != "outbox":
        for option, given, default in (("name", name, None), ("partitions", partitions, 1)):
            if given != default:
                raise ConfigurationError(
                    f'{option}={given!r} is of outbox delivery: add delivery="outbox".'
                )
        return None
    if name is not None and (not isinstance(name, str) or not name or "\0" in name):
        raise ConfigurationError(f"name={name!r}: give a text that is not empty.")
    if not isinstance(partitions, int) or not 1 <= partitions <= 256:
        raise ConfigurationError(f"partitions={partitions!r}: give a whole number from 1 to 256.")
    if partitions > 1 and name is None:
        raise ConfigurationError(
            f"partitions={partitions!r} are shared by processes of one name: add name=."
        )
    if not isinstance(lease, int | float) or not 1 <= lease <= 3600:
        raise ConfigurationError(f"lease={lease!r}: give seconds, from 1 to 3,600.")
    return Consumer(name, partitions, float(lease))
