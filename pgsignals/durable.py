"""One run of a Hub in outbox delivery: the source, the receivers, and what is between them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from psycopg2.extensions import cursor as Cursor

from .broadcasters.durable import DurableInProcess, Failed
from .connection import connect
from .dispatch import Dispatcher
from .errors import ConfigurationError, DriftError
from .events import Event, Gap, Topic
from .inspection import Health, Status, read_queue_usage, read_states
from .metrics import Meter
from .outbox import schema
from .outbox.channels import (
    Channel,
    Remains,
    define_for,
    former_topic,
    moved,
    note_moved,
    read_moved,
    wanted,
)
from .outbox.housekeeping import Housekeeper
from .outbox.inspection import read_outbox
from .outbox.pages import Page
from .outbox.store import DeadLetter, Letter
from .payload import Cast, Decoder, Layout
from .relaying import Relay, relay_consumers
from .runs import Audience, Lag, Settings
from .sources.outbox import ChannelDecoder, Consumer, OutboxSource
from .triggers import names
from .triggers.definitions import Definition, define
from .triggers.installer import check, install, prune

log = logging.getLogger("pgsignals")


class DurableRun:
    """Events from the outbox: prepares its source, and is its sink."""

    def __init__(
        self, settings: Settings, audience: Audience, meter: Meter, consumer: Consumer
    ) -> None:
        self._settings = settings
        self._audience = audience
        self._meter = meter
        self._consumer = consumer
        self._definitions: list[Definition] = []
        self._was_active = False
        self._moved: Mapping[int, tuple[str, str]] = {}
        self._problem: ConfigurationError | None = None
        self._pruned = not settings.prune
        self._lag = Lag(lambda: self.source.now())
        self._receivers = DurableInProcess(
            audience.registry, audience.failed, self._bury, settings.tracer
        )
        self.dispatcher = Dispatcher(
            [self._lag, self._receivers], settings.workers, settings.queue_size, audience.gap
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
                broadcasters, relay_consumers(consumer, broadcasters), strict=True
            )
        ]
        self._housekeeper = Housekeeper(
            settings.dsn, settings.timing.timeout, self._remove_former_triggers
        )

    def start(self) -> None:
        """See Run."""
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
        return drained

    def abandon(self) -> None:
        """See Run."""
        self.source.abandon()
        for relay in self._relays:
            relay.abandon()
        self._housekeeper.abandon()

    def settle(self, call: Callable[[], None]) -> None:
        """See Run."""
        self.source.settle(lambda: self.dispatcher.settle(call))

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
            connected=self.source.is_connected,
            depth=self.dispatcher.depth,
            oldest=self.dispatcher.oldest,
            received=self.source.received,
            invalid=self.source.invalid,
            reconnects=self.source.reconnects,
            name=self._consumer.name,
            active=self.source.is_active,
            retrying=self._receivers.retrying,
            unacknowledged=self.source.outstanding,
            outbox=outbox,
            backends=tuple(relay.status for relay in self._relays),
        )

    def health(self) -> Health:
        """See Run."""
        alive, connected = self.source.is_alive, self.source.is_connected
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
        )

    def define(self, cursor: Cursor) -> list[Definition]:
        """Resolve the watchers; after the first time, a table that changed is no reason to stop."""
        self._problem = None
        try:
            definitions = self._resolve(cursor)
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
            install(cursor, settings.namespace, triggers, settings.limits)
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
        return found

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
        self.source.bury(letter, kept)
