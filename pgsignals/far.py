"""A run of a Hub whose events come from a broker: no database is asked for anything."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from .arrivals import Arrivals
from .broadcasters import Broadcaster
from .broadcasters.durable import DurableInProcess, Failed
from .cloudevents import Received, read
from .dispatch import Dispatcher
from .errors import ConfigurationError, PayloadError
from .events import Gap, Topic, model_identity, model_name
from .inspection import Health, Status
from .metrics import Meter, Tracer
from .plugins import load_plugins
from .runs import Audience, all_resolvers, in_process
from .sources import RemoteSource, Wanted
from .tables import Resolver, TableRef, resolve
from .watchers import Watcher

log = logging.getLogger("pgsignals")

# Of the Gaps that came lately: a broker may have one in each of its partitions.
_KNOWN_GAPS = 1000
_FATE = "acknowledged all the same"


@dataclass(frozen=True)
class FarSettings:
    """What ``start`` was told; see :meth:`pgsignals.Hub.start`."""

    url: str = field(repr=False)
    watchers: tuple[Watcher, ...]
    resolvers: Sequence[Resolver]
    name: str | None
    workers: int
    queue_size: int
    tracer: Tracer | None = None


class FarRun:
    """Events from a broker: says which watcher each belongs to, and is its source's sink."""

    def __init__(self, settings: FarSettings, audience: Audience, meter: Meter) -> None:
        self._settings = settings
        self._audience = audience
        self._meter = meter
        self._gaps: OrderedDict[str, None] = OrderedDict()
        # What receivers that are tried again may be behind with.
        self._most = 10 * settings.queue_size
        self._lag = 0.0
        self._received = self._invalid = self._reconnects = 0
        self._was_connected = False
        resolvers = all_resolvers(settings.resolvers)
        self._tables = [_FarWatcher(each, resolvers) for each in settings.watchers]
        _share_snapshots(self._tables)
        self._found: dict[tuple[str, str, str, str | None], _FarWatcher | None] = {}
        self._arrivals: Arrivals | None = None
        receivers: Broadcaster = in_process(audience, settings.tracer)
        self._retries: DurableInProcess | None = None
        if settings.name is not None:
            self._arrivals = Arrivals()
            receivers = self._retries = DurableInProcess(
                audience.registry, audience.failed, self._give_up, settings.tracer, fate=_FATE
            )
        self._dispatcher = Dispatcher(
            [receivers],
            settings.workers,
            settings.queue_size,
            audience.gap,
        )
        self._source: RemoteSource = load_plugins().source(settings.url)

    def start(self) -> None:
        """See Run."""
        settings = self._settings
        self._audience.registry.bind([topic for each in self._tables for topic in each.topics])
        for each in self._tables:
            for topic in each.topics:
                self._meter.count("events", 0, **topic.fields)
        wanted = [Wanted(each.ref.name, each.ref.schema, each.ops) for each in self._tables]
        self._dispatcher.start()
        if self._retries is not None:
            self._retries.start()
        self._audience.timer.start()
        self._source.start(wanted, settings.name, self)

    def stop(self, timeout: float) -> bool:
        """See Run."""
        deadline = time.monotonic() + timeout
        self._source.stop(timeout)
        self._audience.timer.drain()
        drained = self._dispatcher.stop(max(0.0, deadline - time.monotonic()))
        self._audience.timer.stop(max(0.0, deadline - time.monotonic()))
        self._source.close(max(1.0, deadline - time.monotonic()))
        return drained

    def abandon(self) -> None:
        """See Run."""
        self._source.abandon()

    def settle(self, call: Callable[[], None]) -> None:
        """See Run, and RemoteSink: what has been read has been handled."""
        if self._arrivals is not None:
            call = self._arrivals.close(call)
        self._dispatcher.settle(call)

    def status(self) -> Status:
        """See Run."""
        return Status(
            watchers=(),
            namespace="",
            queue_usage=0.0,
            running=True,
            connected=self._source.is_connected,
            depth=self._dispatcher.depth,
            oldest=self._dispatcher.oldest,
            received=self._received,
            invalid=self._invalid,
            shed=self._dispatcher.shed,
            reconnects=self._reconnects,
            name=self._settings.name,
            active=self._source.is_connected,
            retrying=0 if self._retries is None else self._retries.retrying,
            unacknowledged=0 if self._arrivals is None else self._arrivals.count,
        )

    def health(self) -> Health:
        """See Run."""
        alive, connected = self._source.is_alive, self._source.is_connected
        if not alive:
            reason = "the thread that reads has ended"
        elif not connected:
            reason = "the connection is lost, and being made again"
        else:
            reason = ""
        return Health(
            alive=alive,
            ready=not reason,
            connected=connected,
            reason=reason,
            depth=self._dispatcher.depth,
            oldest=self._dispatcher.oldest,
            lag=self._lag,
        )

    @property
    def full(self) -> bool:
        """See RemoteSink."""
        arrivals = self._arrivals
        return self._dispatcher.full or (arrivals is not None and arrivals.count >= self._most)

    def wait_for_room(self, timeout: float) -> bool:
        """See RemoteSink."""
        deadline = time.monotonic() + timeout
        if self._arrivals is not None and not self._arrivals.wait_for_less_than(
            self._most, timeout
        ):
            return False
        return self._dispatcher.wait_for_room(max(0.0, deadline - time.monotonic()))

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
            self._invalid += 1
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
            self._invalid += 1
            self._meter.count("invalid_payloads")
            if self._is_new(str(error)):
                log.error("a watcher is broken: %s", error)
                now = datetime.now(timezone.utc)
                self.gap(Gap(now, now, "watcher_broken", str(error)))
            return
        message = received.message(topic, position, redelivered)
        self._received += 1
        self._lag = max(0.0, (datetime.now(timezone.utc) - message.at).total_seconds())
        self._meter.count("events", **topic.fields)
        if self._arrivals is not None:
            self._arrivals.add(message)
        self._dispatcher.submit(message)

    def gap(self, gap: Gap) -> None:
        """See RemoteSink."""
        self._dispatcher.announce(lambda: self._audience.gap(gap))

    def connected(self) -> None:
        """See RemoteSink."""
        if self._was_connected:
            self._reconnects += 1
            self._meter.count("reconnects")
        self._was_connected = True
        self._dispatcher.announce(self._audience.connected)

    def disconnected(self, error: BaseException) -> None:
        """See RemoteSink."""
        self._dispatcher.announce(lambda: self._audience.disconnected(error))

    def _give_up(self, failed: Failed, given_up: Callable[[], None]) -> None:
        event = failed.event
        self._meter.count("given_up", receiver=failed.receiver)
        if (position := event.position) is not None:
            error = type(failed.error).__name__
            self._source.refuse(position, f"{failed.receiver} raised {error}")
        given_up()

    def _watcher_of(self, received: Received) -> _FarWatcher | None:
        """The one watcher that the event is for: it was one watcher's where it comes from, too."""
        identity = received.schema, received.table, received.op, received.label
        if identity not in self._found:
            self._found[identity] = next(
                (each for each in self._tables if each.matches(*identity)), None
            )
        return self._found[identity]

    def _is_new(self, what: str) -> bool:
        if what in self._gaps:
            return False
        self._gaps[what] = None
        if len(self._gaps) > _KNOWN_GAPS:
            self._gaps.popitem(last=False)
        return True


def _share_snapshots(tables: Sequence[_FarWatcher]) -> None:
    """Of the watchers of a model, as of a label, the first gets snapshots, with all that is asked.

    A row of a backfill comes once, however many watchers a model has.
    """
    groups: dict[tuple[str | None, int | str], list[_FarWatcher]] = {}
    for each in tables:
        if each.watcher.ops != ("truncated",):
            identity = "" if each.watcher.label is not None else model_identity(each.watcher.model)
            groups.setdefault((each.watcher.label, identity), []).append(each)
    for first, *others in groups.values():
        first.ops = (*first.watcher.ops, "snapshot")
        for other in others:
            first.in_snapshots = tuple(dict.fromkeys((*first.in_snapshots, *other.in_snapshots)))


class _FarWatcher:
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
        """What the receivers are checked against, before any event has told the table's key."""
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
        """Whether events of this table, operation and label are its."""
        return (
            table == self.ref.name
            and self.ref.schema in (None, schema)
            and op in self.ops
            and label == self.watcher.label
        )

    def topic(self, received: Received) -> Topic:
        """The topic of an event, by the names that this process's model has for its columns.

        Raises PayloadError when it lacks a column that the watcher asks for.
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
        """The attribute of a column: who sends may watch the table by its name."""
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
