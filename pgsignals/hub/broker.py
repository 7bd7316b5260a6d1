"""Broker delivery: events that another process forwards; no database is used."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from ..core.errors import ConfigurationError, PayloadError
from ..core.events import Gap, Topic, model_identity, model_name
from ..core.logging import log
from ..core.metrics import Meter
from ..core.redaction import type_name
from ..core.tables import Resolver, TableRef
from ..core.watchers import Watcher
from ..dispatch.durable_in_process import DurableInProcess, Failed
from ..dispatch.held_events import Ledger
from ..dispatch.in_flight import InFlight
from ..plugins.cloudevents import Received, read
from ..plugins.loader import load_plugins
from ..plugins.source import RemoteSource, Wanted
from ..triggers.table_lookup import resolve
from .callbacks import Callbacks
from .delivery import Delivery, Reading
from .options import Options

# How many of the latest Gaps are remembered: a broker may have the same one in each partition.
_KNOWN_GAPS = 1000
_FATE = "acknowledged all the same"


class BrokerDelivery(Delivery):
    """Delivers events from a broker: finds each event's watcher, and is the sink of the source.

    It counts the events itself, since the source of a plugin does not.
    """

    # Empty, since the end of a plugin's thread shows in ``is_alive``.
    failure = ""

    def __init__(self, options: Options, callbacks: Callbacks, meter: Meter) -> None:
        self._in_flight = None if options.name is None else InFlight()
        super().__init__(
            options,
            callbacks,
            meter,
            None if options.name is None else self._make_retries(options, callbacks),
            now=lambda: datetime.now(timezone.utc),
        )
        self._gaps: OrderedDict[str, None] = OrderedDict()
        # The most events in flight, where receivers that raise are called again.
        self._most = 10 * options.queue_size
        self.received = self.invalid = self.reconnects = 0
        self._was_connected = False
        self._watchers = [_BrokerWatcher(each, options.resolvers) for each in options.watchers]
        _share_snapshots(self._watchers)
        self._found: dict[tuple[str, str, str, str | None], _BrokerWatcher | None] = {}
        self.source: RemoteSource = load_plugins().source(options.dsn)

    def _make_retries(self, options: Options, callbacks: Callbacks) -> DurableInProcess:
        return DurableInProcess(
            callbacks.registry,
            callbacks.tell_failure,
            self._give_up,
            options.tracer,
            ledger=Ledger(callbacks.registry, options.queue_size),
            isolating=options.isolating,
            fate=_FATE,
        )

    def start(self) -> None:
        topics = [topic for each in self._watchers for topic in each.topics]
        self._callbacks.registry.bind(topics, retried=self._options.name is not None)
        for topic in topics:
            self._meter.count("events", 0, **topic.fields)
        super().start()
        wanted = [Wanted(each.ref.name, each.ref.schema, each.ops) for each in self._watchers]
        self.source.start(wanted, self._options.name, self)

    def _stop_reading(self, timeout: float) -> None:
        self.source.stop(timeout)

    def _close(self, timeout: float) -> None:
        self.source.close(max(1.0, timeout))

    def abandon(self) -> None:
        self.source.abandon()

    def settle(self, call: Callable[[], None]) -> None:
        """See Delivery, and RemoteSink: what has been read has been handled."""

        def settled() -> None:
            try:
                call()
            # An error of the source's: what it could not note comes again, and workers go on.
            except BaseException:
                log.exception("%s could not note what has been settled", self.source)

        if self._in_flight is not None:
            self.dispatcher.hand_over(self._in_flight.close(settled).acknowledge)
        else:
            self.dispatcher.settle(settled)

    @property
    def is_connected(self) -> bool:
        """See Reading."""
        return self.source.is_connected

    @property
    def is_alive(self) -> bool:
        """See Reading."""
        return self.source.is_alive

    @property
    def _sources(self) -> Sequence[Reading]:
        return [self]

    @property
    def _active(self) -> bool:
        return self.is_connected

    @property
    def _unacknowledged(self) -> int:
        return 0 if self._in_flight is None else self._in_flight.count

    @property
    def full(self) -> bool:
        """See RemoteSink."""
        return self.dispatcher.full or self._unacknowledged >= self._most

    def wait_for_room(self, timeout: float) -> bool:
        """See RemoteSink."""
        deadline = time.monotonic() + timeout
        if self._in_flight is not None and not self._in_flight.wait_for_less_than(
            self._most, timeout
        ):
            return False
        return self.dispatcher.wait_for_room(max(0.0, deadline - time.monotonic()))

    def receive(
        self,
        attributes: Mapping[str, str],
        data: bytes | None,
        *,
        position: str | None = None,
        redelivered: bool = False,
    ) -> None:
        """See RemoteSink."""
        try:
            received = read(attributes, data)
        except PayloadError as error:
            self.invalid += 1
            self._meter.count("invalid_payloads")
            log.warning("ignored a message at %s that is not from pgsignals: %s", position, error)
            return
        if isinstance(received, Gap):
            if self._is_new(attributes["id"]):
                self.gap(received)
            return
        watcher = self._watcher_of(received)
        if watcher is None:
            return
        try:
            topic = watcher.topic(received)
        except PayloadError as error:
            self.invalid += 1
            self._meter.count("invalid_payloads")
            if self._is_new(str(error)):
                log.error("a watcher is broken: %s", error)
                now = datetime.now(timezone.utc)
                self.gap(Gap(now, now, "watcher_broken", str(error)))
            return
        message = received.message(topic, position, redelivered)
        self.received += 1
        self._meter.count("events", **topic.fields)
        if self._in_flight is not None:
            self._in_flight.add(message)
        self.dispatcher.submit(message)

    def gap(self, gap: Gap) -> None:
        """See RemoteSink."""
        self.dispatcher.announce(lambda: self._callbacks.tell_gap(gap))

    def connected(self) -> None:
        """See RemoteSink."""
        if self._was_connected:
            self.reconnects += 1
            self._meter.count("reconnects")
        self._was_connected = True
        super().connected()

    def _give_up(self, failed: Failed, given_up: Callable[[], None]) -> None:
        event = failed.event
        self._meter.count("given_up", receiver=failed.receiver)
        if (position := event.position) is not None:
            reason = f"{failed.receiver} raised {type_name(failed.error)}"
            try:
                self.source.refuse(position, reason)
            # The event is settled all the same: otherwise those behind it would never be delivered.
            except BaseException:
                log.exception("%s could not be told of an event that was given up", self.source)
        given_up()

    def _watcher_of(self, received: Received) -> _BrokerWatcher | None:
        """Return the watcher of an event; only one, as where the event comes from."""
        identity = received.schema, received.table, received.op, received.label
        if identity not in self._found:
            self._found[identity] = next(
                (each for each in self._watchers if each.matches(*identity)), None
            )
        return self._found[identity]

    def _is_new(self, what: str) -> bool:
        if what in self._gaps:
            return False
        self._gaps[what] = None
        if len(self._gaps) > _KNOWN_GAPS:
            self._gaps.popitem(last=False)
        return True


def _share_snapshots(tables: Sequence[_BrokerWatcher]) -> None:
    """Add snapshots to the first watcher of each model or label, with all columns asked for.

    A row of a backfill comes once, however many watchers a model has.
    """
    groups: dict[tuple[str | None, int | str], list[_BrokerWatcher]] = {}
    for each in tables:
        if each.watcher.ops != ("truncated",):
            identity = "" if each.watcher.label is not None else model_identity(each.watcher.model)
            groups.setdefault((each.watcher.label, identity), []).append(each)
    for first, *others in groups.values():
        first.ops = (*first.watcher.ops, "snapshot")
        for other in others:
            first.in_snapshots = tuple(dict.fromkeys((*first.in_snapshots, *other.in_snapshots)))


class _BrokerWatcher:
    """A watcher, and the topics of the events that have come for it."""

    def __init__(self, watcher: Watcher, resolvers: Sequence[Resolver]) -> None:
        self.watcher = watcher
        self.ref: TableRef
        self.ref, _ = resolve(watcher.model, resolvers)
        self._attributes: dict[str, str] = {}
        for attribute, column in self.ref.attributes.items():
            self._attributes.setdefault(column, attribute)
        self._asked = tuple(dict.fromkeys((*watcher.columns, *watcher.extra)))
        self.ops = watcher.ops
        self.in_snapshots = self._asked
        self._seen: dict[tuple[Any, ...], Topic] = {}

    @property
    def topics(self) -> list[Topic]:
        """The topics that receivers are checked against, before an event has shown the key."""
        return [
            self._topic(
                op,
                self.ref.schema or "public",
                # A plain name does not tell its key.
                tuple(self._attributes.get(c, c) for c in self.ref.key or ("id",))
                if op != "truncated"
                else (),
                self._asked_of(op),
                op == "updated" and bool(self._asked),
            )
            for op in self.ops
        ]

    def _asked_of(self, op: str) -> tuple[str, ...]:
        if op == "snapshot":
            return self.in_snapshots
        return self._asked if op != "truncated" else ()

    def matches(self, schema: str, table: str, op: str, label: str | None) -> bool:
        """Whether events of this table, operation and label are this watcher's."""
        return (
            table == self.ref.name
            and self.ref.schema in (None, schema)
            and op in self.ops
            and label == self.watcher.label
        )

    def topic(self, received: Received) -> Topic:
        """Return the topic of an event, with the names that this process's model has for columns.

        Raises PayloadError when the event lacks a column that the watcher asks for.
        """
        signature = (
            received.schema,
            received.op,
            tuple(received.key),
            None if received.truncated else tuple(received.values),
        )
        if signature not in self._seen:
            key = tuple(map(self._name, received.key))
            values = tuple(map(self._name, received.values))
            asked = self._asked_of(received.op)
            missing = [name for name in asked if name not in (*key, *values)]
            if missing and not received.truncated:
                raise PayloadError(
                    f"events ({self.watcher}, {received.op!r}) come without {missing[0]!r}, which "
                    f"the watcher here asks for: add extra=[{missing[0]!r}] to the watcher that "
                    "sends them, or leave it out here."
                )
            self._seen[signature] = self._topic(
                received.op,
                received.schema,
                key,
                asked if received.truncated else values,
                received.compared,
            )
        return self._seen[signature]

    def _name(self, name: str) -> str:
        """Return the attribute of a column; a sender may watch the table, and send column names."""
        return name if name in self.ref.attributes else self._attributes.get(name, name)

    def _topic(
        self, op: str, schema: str, key: tuple[str, ...], values: tuple[str, ...], compared: bool
    ) -> Topic:
        return Topic(
            model=self.watcher.model,
            op=op,
            label=self.watcher.label,
            schema=schema,
            table=self.ref.name,
            key=key,
            values=values,
            compared=compared,
            loader=self._cannot_load,
        )

    def _cannot_load(
        self, session: Any, ids: Sequence[tuple[Any, ...]], /, **options: Any
    ) -> list[Any]:
        raise ConfigurationError(
            f"load() of {model_name(self.watcher.model)}: the event has come from a broker, and "
            "pgsignals knows no database here. Have the values travel with extra=[…], or query the "
            "record by event.id yourself."
        )
