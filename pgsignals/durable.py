"""One run of a Hub in outbox delivery: the source, the receivers, and what is between them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from psycopg2.extensions import cursor as Cursor

from .backfills import Backfill
from .broadcasters.durable import DurableInProcess, Failed
from .connection import connect
from .dispatch import Dispatcher
from .errors import ConfigurationError, DriftError, StateError, TableError, near
from .events import Event, Gap, Topic, model_identity, model_name
from .inspection import Health, Status, read_queue_usage, read_states
from .metrics import Meter
from .outbox import schema
from .outbox.backfill import request
from .outbox.channels import (
    Channel,
    Remains,
    define_for,
    former_topic,
    install_noting_losses,
    moved,
    note_moved,
    read_moved,
    wanted,
)
from .outbox.housekeeping import Housekeeper
from .outbox.inspection import read_outbox
from .outbox.pages import Page
from .outbox.snapshots import SnapshotMessage, SnapshotTopic, snapshot_topics
from .outbox.store import DeadLetter, Letter
from .payload import Cast, Decoder, Layout
from .relaying import Relay, relay_consumers
from .runs import Audience, Lag, Settings
from .sources.outbox import ChannelDecoder, Consumer, OutboxSource
from .tailing import Tail
from .triggers import names
from .triggers.definitions import Definition, define
from .triggers.installer import check, prune

log = logging.getLogger("pgsignals")


class DurableRun:
    """Events from the outbox: prepares its source, and is its sink.

    Without workers it has no consumer for receivers: events only go on to ``backends``.
    """

    def __init__(
        self, settings: Settings, audience: Audience, meter: Meter, consumer: Consumer
    ) -> None:
        self._settings = settings
        self._audience = audience
        self._meter = meter
        self._consumer = consumer
        self._definitions: list[Definition] = []
        self._snapshots: list[SnapshotTopic] = []
        self._was_active = False
        self._moved: Mapping[int, tuple[str, str]] = {}
        self._problem: ConfigurationError | None = None
        self._pruned = not settings.prune
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
        self.source = OutboxSource(
            settings.dsn,
            settings.listen_dsn,
            self,
            self,
            settings.timing,
            meter,
            consumer,
            10 * settings.queue_size,
        )
        broadcasters = [make() for make in settings.backends]
        self._relays = [
            Relay(broadcaster, settings, self, own, meter)
            for broadcaster, own in zip(
                broadcasters,
                relay_consumers(consumer, broadcasters, settings.backend_names),
                strict=True,
            )
        ]
        self._housekeeper = Housekeeper(
            settings.dsn, settings.timing.timeout, self._remove_former_triggers
        )
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
                tail = Tail(self._settings, lambda: self._definitions, self.decoders)
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

    def define(self, cursor: Cursor) -> list[Definition]:
        """Resolve the watchers; after the first time, a table that changed is no reason to stop."""
        self._problem = None
        try:
            definitions = self._resolve(cursor)
            present = [each for each in definitions if not isinstance(each, Remains)]
            # What a process without a name has missed is not the outbox's to know.
            snapshots = [] if self._consumer.name is None else snapshot_topics(present)
            topics = [each.topic for each in definitions] + [each.topic for each in snapshots]
            self._audience.registry.bind(topics if self._receiving else ())
        except ConfigurationError as error:
            if not self._definitions:
                raise
            log.error("the watchers no longer fit the database: %s", error)
            self._problem = error
        else:
            self._definitions, self._snapshots = definitions, snapshots
            for definition in definitions:
                self._meter.count("events", 0, **definition.topic.fields)
        return self._definitions

    def _resolve(self, cursor: Cursor) -> list[Definition]:
        settings, name = self._settings, self._consumer.name
        resolvers, namespace = settings.resolvers, settings.namespace
        if name is None:
            return define(cursor, settings.watchers, resolvers, namespace, durable=True)
        return define_for(cursor, name, settings.watchers, resolvers, namespace)

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """See that the schema and the triggers are there, as far as the settings allow."""
        settings = self._settings
        fitting = [each for each in definitions if not isinstance(each, Remains)]
        triggers = [definition.trigger for definition in fitting]
        if settings.install == "auto":
            schema.install_schema(cursor, settings.limits)
        elif settings.install == "check":
            schema.check_schema(cursor)
        if self._problem is not None:
            return
        if settings.install == "auto":
            install_noting_losses(cursor, settings.namespace, triggers, settings.limits)
            self._moved = read_moved(cursor, settings.namespace, fitting)
            note_moved(cursor, self._moved)
            if not self._pruned:
                prune(cursor, settings.namespace, triggers, limits=settings.limits)
                self._pruned = True
        elif settings.install == "check":
            check(cursor, settings.namespace, triggers)
            self._moved = read_moved(cursor, settings.namespace, fitting)

    def decoders(
        self, channels: Sequence[tuple[int, int, str]], cast: Cast
    ) -> Mapping[int, ChannelDecoder]:
        """How to read each channel of a watcher, those of its former definitions too."""
        known = {
            key: Channel(key, since, moved(Layout.decode(text), self._moved.get(key)))
            for key, since, text in channels
        }
        found: dict[int, ChannelDecoder] = {}
        for definition in self._definitions:
            own = names.channel_key(definition.trigger.hash)
            if own not in known:
                raise DriftError(
                    f"The schema {schema.NAME!r} does not know the trigger for {definition}: it "
                    "was installed before the schema was made anew. Run `pgsignals uninstall` and "
                    "then `pgsignals install --delivery outbox`."
                )
            for key, until in wanted(own, known).items():
                if key == own:
                    decoder = definition.decoder(cast)
                else:
                    former = known[key].layout
                    topic = former_topic(definition.topic, former)
                    decoder = Decoder(topic, former.key_fields, former.value_fields, cast)
                found[key] = ChannelDecoder(decoder, until)
        for each in self._snapshots:
            found[each.channel] = ChannelDecoder(each.decoder(cast))
        return found

    def backfill(self, target: Any, where: str | None, chunk: int, name: str | None) -> Backfill:
        """See :meth:`pgsignals.Hub.backfill`."""
        own = self._consumer.name
        if own is None:
            raise ConfigurationError(
                "backfill() is for a consumer with a name, by which it goes on after a crash: "
                'start(delivery="outbox", name=…).'
            )
        known = [own, *(relay.source.name for relay in self._relays)]
        if name is not None and name not in known:
            raise ConfigurationError(
                f"name={name!r} is no consumer of this Hub{near(name, known)} They are "
                f"{', '.join(map(repr, known))}."
            )
        found = self._snapshot(target)
        topic = found.topic
        registry = self._audience.registry
        if name in (None, own) and not (any(registry.receivers(topic)) or registry.observers):
            raise ConfigurationError(
                f"backfill({model_name(target)}): no receiver listens to its snapshots. Add "
                f"'snapshot' to one: @pgsignals.on({model_name(target)}, 'snapshot')."
            )
        twins = [
            each
            for each in self._snapshots
            if each.fits(topic.schema, topic.table, topic.label, None)
        ]
        connection = connect(self._settings.dsn)
        try:
            with connection.cursor() as cursor:
                number = request(
                    cursor,
                    name or own,
                    topic.schema,
                    topic.table,
                    topic.label,
                    model_name(topic.model) if len(twins) > 1 else None,
                    where,
                    chunk,
                )
        finally:
            connection.close()
        return Backfill(self._settings.dsn, number)

    def _snapshot(self, target: Any) -> SnapshotTopic:
        identity = model_identity(target)
        registry = self._audience.registry
        for each in self._snapshots:
            if identity in registry.names(each.topic):
                return each
        for definition in self._definitions:
            if identity in registry.names(definition.topic):
                raise TableError(
                    f"{definition.trigger.spec.table.qualified} has no key, in whose order a "
                    "backfill goes: give it a primary key."
                )
        known = sorted(
            {each.topic.label or model_name(each.topic.model) for each in self._snapshots}
        )
        raise ConfigurationError(
            f"backfill({model_name(target)}): no watcher delivers that"
            f"{near(model_name(target), known)} Watched are {', '.join(known)}."
        )

    def _remove_former_triggers(self, cursor: Cursor) -> None:
        """What only former definitions of our consumer needed goes when this process reads for it.

        The start comes too early for that: until the claim, the consumer may be another's.
        """
        settings = self._settings
        was_active, self._was_active = self._was_active, self.source.is_active
        if self._was_active and not was_active and settings.install == "auto" and settings.prune:
            fitting = [each.trigger for each in self._definitions if not isinstance(each, Remains)]
            prune(cursor, settings.namespace, fitting, limits=settings.limits)

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
