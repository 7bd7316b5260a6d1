"""Durable delivery, at least once: reads a log for each consumer from its cursor on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psycopg2
from psycopg2.extensions import cursor as Cursor

from ..consumers.backfills.requests import Backfill, request
from ..consumers.claims import Consumer
from ..consumers.dead_letters import DeadLetter, Undeliverable
from ..consumers.parking import Parking
from ..consumers.parking_store import kept_as
from ..core.errors import ConfigurationError, DatabaseError, ReceiverError, StateError, near
from ..core.events import Event, Gap, Topic, model_name
from ..core.logging import log
from ..core.metrics import Meter
from ..core.redaction import described, error_text, trace_text
from ..core.transport import Capture, Transport
from ..dispatch.dispatcher import topic_of
from ..dispatch.durable_in_process import DurableInProcess, Failed
from ..dispatch.held_events import Held, Ledger
from ..dispatch.in_flight import Page
from ..outbox.housekeeping import Housekeeper
from ..plugins.broadcaster import Broadcaster
from ..postgres.connection import opened
from ..sources.durable import DurablePreparer, DurableSource
from ..sources.tail import Tail
from ..sources.wal_tail import WalTail
from ..triggers.names import streams_slot
from ..wal.following import keep_near
from .callbacks import Callbacks
from .delivery import DatabaseDelivery, Reading, Working
from .durable_forwarder import DurableForwarder, backend_consumers
from .moving import MovingSetup
from .options import Options
from .setup import OutboxSetup, WalSetup
from .slot_gauges import SlotGauges

_SETUPS: Mapping[Transport, type[OutboxSetup] | type[WalSetup]] = {
    Transport.OUTBOX: OutboxSetup,
    Transport.WAL: WalSetup,
}


class DurableDelivery(DatabaseDelivery):
    """Delivers events from a log: has its sources, and is the sink of the receivers' source.

    Without workers it has no consumer for receivers: events only go on to ``backends``.
    """

    _hangs = "a thread that reads events has ended or hangs"

    def __init__(
        self,
        options: Options,
        callbacks: Callbacks,
        meter: Meter,
        broadcasters: Sequence[Broadcaster],
        backend_names: Sequence[str],
    ) -> None:
        consumer, registry = options.consumer, callbacks.registry
        if not options.workers and registry.subscriptions:
            raise ReceiverError(
                "workers=0 only passes events on to backends, and this Hub has receivers: start "
                "those in another Hub, or give it workers."
            )
        consumers = backend_consumers(consumer, broadcasters, backend_names)
        reading = [consumer, *consumers] if options.workers else consumers
        names = [each.name for each in reading if each.name is not None]
        self._setup = _SETUPS[options.transport](options, registry, meter, names)

        def former(
            transport: Transport, capture: Capture | None, name: str
        ) -> OutboxSetup | WalSetup:
            """Return the setup for a consumer that comes from another log, which it leaves."""
            leaving = replace(
                options,
                delivery=transport.value,
                capture=capture,
                allow_unbounded_wal=True,
                prune=False,
            )
            return _SETUPS[transport](leaving, registry, meter, [name])

        def prepared(consumer: Consumer) -> DurablePreparer:
            if consumer.name is None:
                return self._setup
            moving = MovingSetup(options, self._setup, former, consumer.name, consumer.parts)
            self._moving.append(moving)
            return moving

        self._moving: list[MovingSetup] = []
        self._forwarders = [
            DurableForwarder(broadcaster, options, prepared(own), own, meter)
            for broadcaster, own in zip(broadcasters, consumers, strict=True)
        ]
        self._ledger = Ledger(registry, options.queue_size, options.isolating)
        self._receivers = DurableInProcess(
            registry,
            callbacks.tell_failure,
            self._keep_dead_letter,
            options.tracer,
            ledger=self._ledger,
            isolating=options.isolating,
        )
        super().__init__(
            options,
            callbacks,
            meter,
            self._receivers,
            now=lambda: self.source.now(),
            backends=self._forwarders,
        )
        self.source = DurableSource(
            options,
            prepared(consumer),
            self,
            meter,
            consumer,
            10 * options.queue_size,
            Parking(self._ledger, self._feed, lambda: self.dispatcher.moving, self._tell_of_loss),
        )
        self._was_active = False
        self._logged = options.transport is Transport.WAL
        self._slots = SlotGauges(meter, names) if self._logged and names else None
        self._housekeeper = Housekeeper(options.dsn, options.timing.timeout, self._look_after)
        self._tail: Tail | WalTail | None = None
        self._tail_lock = threading.Lock()
        self._stopping = False

    def start(self) -> None:
        if self._receiving:
            self.source.start()
        super().start()
        self._housekeeper.start()

    def stop(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        self._stopping = True
        drained = super().stop(timeout)
        self._housekeeper.stop(max(0.0, deadline - time.monotonic()))
        if self._tail is not None:
            self._tail.stop(max(0.0, deadline - time.monotonic()))
        return drained

    def _stop_reading(self, timeout: float) -> None:
        self.source.pause()
        # All of them first: otherwise the others would read on while one is waited for.
        for forwarder in self._forwarders:
            forwarder.source.pause()

    def _close(self, timeout: float) -> None:
        self.source.stop(timeout)

    def abandon(self) -> None:
        self.source.abandon()
        super().abandon()
        self._housekeeper.abandon()
        if self._tail is not None:
            self._tail.abandon()

    def tail(self) -> Tail | WalTail:
        """Return the tail of the log, for readers with resume tokens; made when first asked for.

        Raises ConnectError and the other kinds of DatabaseError, or StateError when stopped.
        """
        with self._tail_lock:
            if self._tail is None:
                tail = (WalTail if self._logged else Tail)(
                    self._options,
                    lambda: self._setup.definitions,
                    self._setup.decoders,
                    self._setup.drift,
                )
                try:
                    tail.start()
                except BaseException:
                    tail.stop(0)
                    raise
                self._tail = tail
                # ``stop`` does not take the lock, for which it would have to wait: either it sees
                # the tail, or this sees that the delivery is stopping.
                if self._stopping:
                    tail.stop(0)
                    raise StateError("The Hub was stopped: there is nothing to stream.")
            return self._tail

    def settle(self, call: Callable[[], None]) -> None:
        if not self._receiving:
            raise StateError("With workers=0 nothing is handled here: ask where events are read.")
        self.source.settle(lambda: self.dispatcher.settle(call))

    @property
    def _aside(self) -> tuple[str, ...]:
        """Also the names of the receivers for which events are parked."""
        return tuple(sorted({*self.dispatcher.aside, *self._ledger.parking}))

    def _feed(self, receiver: Any, events: Sequence[tuple[Event, Held]]) -> bool:
        return self.dispatcher.feed(self._receivers, receiver, events)

    def _tell_of_loss(self, gap: Gap, told: Callable[[], None]) -> None:
        def tell() -> None:
            if self._callbacks.tell_gap(gap):
                told()

        self.dispatcher.announce(tell)

    @property
    def _sources(self) -> list[DurableSource]:
        return [self.source] if self._receiving else [each.source for each in self._forwarders]

    @property
    def _reading(self) -> Sequence[Reading]:
        tail = [] if self._tail is None else [self._tail.source]
        own = [self.source] if self._receiving else []
        return [*own, *(each.source for each in self._forwarders), *tail]

    @property
    def _working(self) -> list[Working]:
        return [*super()._working, self._housekeeper]

    @property
    def _active(self) -> bool:
        return any(source.is_active for source in self._sources)

    @property
    def _unacknowledged(self) -> int:
        return sum(source.outstanding for source in self._sources)

    def backfill(self, target: Any, where: str | None, chunk: int, name: str | None) -> Backfill:
        """See :meth:`pgsignals.Hub.backfill`."""
        own = self._options.name
        if own is None:
            raise ConfigurationError(
                "backfill() is for a consumer with a name, by which it goes on after a crash: "
                'start(delivery="outbox", name=…), or delivery="wal".'
            )
        known = [each.source.name for each in self._forwarders]
        if self._receiving:
            known.insert(0, own)
        elif name is None:
            name = known[0] if len(known) == 1 else ""
        if name is not None and name not in known:
            raise ConfigurationError(
                f"name={name!r} is no consumer of this Hub{near(name, known)} They are "
                f"{', '.join(map(repr, known))}."
            )
        found, model = self._setup.snapshot(target)
        topic = found.topic
        if name in (None, own) and not self.hears(topic):
            raise ConfigurationError(
                f"backfill({model_name(target)}): no receiver listens to its snapshots. Add "
                f"'snapshot' to one: @pgsignals.on({model_name(target)}, 'snapshot')."
            )
        with opened(self._options.dsn) as cursor:
            number = request(
                cursor, name or own, topic.schema, topic.table, topic.label, model, where, chunk
            )
        return Backfill(self._options.dsn, number)

    def _look_after(self, cursor: Cursor) -> None:
        if self._slots is not None:
            self._slots.look(cursor)
        self._tidy_triggers(cursor)
        if self._logged:
            self._look_after_streams(cursor)

    def _look_after_streams(self, cursor: Cursor) -> None:
        try:
            if self._tail is not None:
                self._tail.look_after(cursor)
            else:
                cursor.execute("SELECT pg_catalog.current_database()")
                [(database,)] = cursor.fetchall()
                keep_near(cursor, streams_slot(database), None)
        except (psycopg2.Error, DatabaseError) as error:
            log.warning(
                "the replication slot of streams to browsers could not be looked after, and is "
                "tried again soon: %s",
                error_text(error),
            )

    def _tidy_triggers(self, cursor: Cursor) -> None:
        was_active = self._was_active
        self._was_active = self._active
        moved = [each for each in self._moving if each.moved]
        if self._was_active and (moved or not was_active):
            for each in moved:
                each.moved = False
            self._setup.remove_former_triggers(cursor)
        if self._was_active:
            self._setup.remove_replaced_triggers(cursor)
        if self._setup.protect_writes(cursor):
            for source in self._sources:
                source.look_again()

    def submit_page(self, events: Sequence[Event], page: Page) -> None:
        """See DurableSink."""
        counts = Counter(map(topic_of, events))
        self.dispatcher.submit_events(events)
        self.dispatcher.hand_over(page.acknowledge)
        for topic, count in counts.items():
            self._meter.count("events", count, **topic.fields)

    def gap(self, gap: Gap, page: Page | None = None) -> None:
        """See DurableSink."""

        def tell() -> None:
            # If the lease is over, the next holder announces the Gap.
            if page is None:
                self._callbacks.tell_gap(gap)
            elif page.lease.holds() and self._callbacks.tell_gap(gap):
                page.acknowledge()

        self.dispatcher.announce(tell)

    def redeliver(self, event: Event, letter: DeadLetter) -> bool:
        """See DurableSink."""
        return self._receivers.redeliver(
            event,
            letter.receiver,
            letter.attempts,
            lambda: self.source.dead_letters.discard(letter.key),
        )

    def hears(self, topic: Topic) -> bool:
        """See DurableSink."""
        registry = self._callbacks.registry
        return any(registry.receivers(topic)) or bool(registry.observers)

    def _keep_dead_letter(self, failed: Failed, kept: Callable[[], None]) -> None:
        dead = Undeliverable(
            *kept_as(failed.event, failed.receiver, self.source.channel_of(failed.event)),
            error=described(failed.error),
            traceback=trace_text(failed.error),
            attempts=failed.tries,
        )
        self.source.dead_letters.add(dead, kept)
