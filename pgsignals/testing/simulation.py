"""Events without a database: ``simulated``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pgsignals
from pgsignals.core.errors import ConfigurationError, near
from pgsignals.core.events import (
    Event,
    Gap,
    Message,
    Topic,
    hashable,
    microseconds,
    model_identity,
    model_name,
)
from pgsignals.core.tables import Resolver
from pgsignals.core.watchers import EVENT_OPERATIONS, Watcher, normalize, watch
from pgsignals.dispatch.in_process import InProcess
from pgsignals.hub.hub import Hub
from pgsignals.hub.options import all_resolvers
from pgsignals.hub.status import Health, Status
from pgsignals.triggers.table_lookup import resolve

_UNSAID: Any = object()


@contextmanager
def simulated(
    watchers: Iterable[Any] | None = None,
    *,
    hub: Hub | None = None,
    resolvers: Sequence[Resolver] = (),
) -> Iterator[Simulation]:
    """Run a Hub, by default the default one, on events that the test makes up.

    With ``watchers``, as ``start`` takes them, receivers and events must fit them; without, every
    event is delivered. Batches are complete at the end of the block. No database is used, so that
    column names, types and conditions (``when``) are not checked.

    Raises what ``start`` raises for watchers and receivers that do not fit, and StateError when
    the Hub is running.
    """
    hub = hub or pgsignals.default_hub
    simulation = Simulation(hub, watchers, all_resolvers(resolvers))
    hub._begin(lambda: simulation)
    try:
        yield simulation
        simulation.flush()
    finally:
        hub.stop()


class Simulation:
    """Makes up events; made by :func:`simulated`.

    Receivers are called in the caller's thread, before ``emit`` returns. If one raises, the others
    are called all the same, as ever, and then its error is raised here.
    """

    def __init__(
        self, hub: Hub, watchers: Iterable[Any] | None, resolvers: Sequence[Resolver]
    ) -> None:
        self._hub = hub
        self._resolvers = resolvers
        self._topics: list[Topic] | None = None
        self._records: dict[Any, Any] = {}
        self._errors: list[BaseException] = []
        self._emitted = itertools.count(1)
        self._count = 0
        self._in_process = InProcess(hub._registry, hub._callbacks.tell_failure)
        if watchers is not None:
            plan = normalize(watchers)
            self._topics = [self._topic(watcher, op) for watcher in plan for op in watcher.ops]
            self._topics += self._snapshots(plan)

    def emit(
        self,
        target: Any,
        op: str,
        *,
        id: Any = None,  # noqa: A002
        values: Mapping[str, Any] | None = None,
        old: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        truncated: bool = False,
        record: Any = _UNSAID,
    ) -> Event:
        """Deliver one event of a model or label, and return it when receivers have handled it.

        ``id`` is the key: a value, a tuple for a key of several columns, or a mapping of names to
        values. ``values`` and ``old`` are the new and the former values of the watcher's columns: a
        column that ``old`` lacks did not change, and with a column of the key in it, the key
        changed. ``record`` is what ``event.load`` gives, None for a record that is gone.

        Raises ConfigurationError for what no watcher delivers, and what a receiver raised.
        """
        if op not in EVENT_OPERATIONS:
            raise ConfigurationError(
                f"{op!r} is not an operation{near(op, EVENT_OPERATIONS)} "
                f"Operations are {', '.join(map(repr, EVENT_OPERATIONS))}."
            )
        topic = self._with_key(self._find(target, op, {**(old or {}), **(values or {})}), id)
        given, former = dict(values or {}), dict(old or {})
        self._check_names(topic, given, former)
        key = self._key_values(topic, id)
        moved = any(name in former for name in topic.key)
        row = [*key]
        if moved:
            row += [former.get(name, value) for name, value in zip(topic.key, key, strict=True)]
        if not truncated:
            new = [given.get(name) for name in topic.values]
            row += new
            if topic.compared:
                before = [former.get(name, given.get(name)) for name in topic.values]
                changes = zip(new, before, strict=True)
                row += [*before, "".join("01"[a != b] for a, b in changes)]
        if record is not _UNSAID:
            self._records[model_identity(topic.model), hashable(key)] = record
        message = Message(
            topic,
            next(self._emitted),
            1,
            microseconds(datetime.now(timezone.utc)),
            dict(context or {}),
            [tuple(row)],
            moved,
            truncated,
        )
        event = Event(message, 0, tuple(row))
        if self._topics is None:
            self._hub._registry.admit(topic)
        self._count += 1
        self._in_process.publish([event])
        self._raise_first()
        return event

    def gap(self, reason: str = "reconnected", *, detail: str = "") -> Gap:
        """Announce a Gap of no length, and return it when its receivers have been called."""
        now = datetime.now(timezone.utc)
        found = Gap(now, now, reason, detail)
        self._hub._callbacks.tell_gap(found)
        return found

    def flush(self) -> None:
        """Call the receivers of batches now. Raises what one of them raised."""
        self._hub._callbacks.timer.flush()
        self._raise_first()

    def start(self) -> None:
        """Check the receivers; the Hub calls this."""
        self._hub._coroutines.begin(None, simulated=True)
        if self._topics is not None:
            self._hub._registry.bind(self._topics)
        self._hub.receiver_failed.connect(self._note_error)
        self._hub._callbacks.tell_connected()

    def stop(self, timeout: float) -> bool:
        """End the simulation; the Hub calls this."""
        self._hub.receiver_failed.disconnect(self._note_error)
        self._in_process.close()
        return True

    def abandon(self) -> None:
        """Give up nothing; the Hub calls this in the child of a fork."""

    def settle(self, call: Callable[[], None]) -> None:
        """Make ``call``, since everything emitted has been handled; the Hub calls this."""
        call()

    def status(self) -> Status:
        """Return the number of events that were emitted; the Hub calls this."""
        return Status((), "default", 0.0, running=True, connected=True, received=self._count)

    def health(self) -> Health:
        """Return that all is well, as always; the Hub calls this."""
        return Health(alive=True, ready=True, connected=True, reason="")

    def _topic(self, watcher: Watcher, op: str) -> Topic:
        ref, _ = resolve(watcher.model, self._resolvers)
        attribute_of: dict[str, str] = {}
        for attribute, column in ref.attributes.items():
            attribute_of.setdefault(column, attribute)
        values = tuple(dict.fromkeys((*watcher.columns, *watcher.extra)))
        with_row = op != "truncated"
        return Topic(
            model=watcher.model,
            op=op,
            label=watcher.label,
            schema=ref.schema or "public",
            table=ref.name,
            # A plain name does not tell its key.
            key=tuple(attribute_of.get(c, c) for c in ref.key or ("id",)) if with_row else (),
            values=values if with_row else (),
            compared=op == "updated" and bool(values),
            loader=lambda session, ids, /, **options: self._load(watcher.model, ids),
            name="simulated",
        )

    def _snapshots(self, watchers: Sequence[Watcher]) -> list[Topic]:
        """Return topics as a backfill has: all that the watchers of a model or label ask for."""
        found: dict[Any, Topic] = {}
        for watcher in watchers:
            if watcher.ops != ("truncated",):
                topic = self._topic(watcher, "snapshot")
                identity = topic.label, "" if topic.label else model_identity(topic.model)
                former = found.setdefault(identity, topic)
                values = tuple(dict.fromkeys((*former.values, *topic.values)))
                found[identity] = replace(former, values=values)
        return list(found.values())

    def _find(self, target: Any, op: str, values: Mapping[str, Any]) -> Topic:
        if self._topics is None:
            bare = self._topic(watch(target), op)
            names = tuple(name for name in values if name not in bare.key)
            return replace(bare, values=names, compared=op == "updated" and bool(names))
        identity = model_identity(target)
        for topic in self._topics:
            if topic.op == op and identity in self._hub._registry.names(topic):
                return topic
        raise ConfigurationError(
            f"No watcher delivers ({model_name(target)}, {op!r}). The watchers deliver "
            + ", ".join(f"({t.label or model_name(t.model)}, {t.op!r})" for t in self._topics)
            + "."
        )

    def _with_key(self, topic: Topic, given: Any) -> Topic:
        """Return the topic with a mapping's key, if its table is known by its name only."""
        if not isinstance(given, Mapping) or not isinstance(topic.model, str):
            return topic
        values = tuple(name for name in topic.values if name not in given)
        return replace(topic, key=tuple(given), values=values)

    def _key_values(self, topic: Topic, given: Any) -> tuple[Any, ...]:
        if isinstance(given, Mapping):
            key = tuple(given[name] for name in topic.key if name in given)
            fits = len(key) == len(topic.key) == len(given)
        else:
            key = given if isinstance(given, tuple) else () if given is None else (given,)
            fits = len(key) == len(topic.key)
        if not fits:
            raise ConfigurationError(
                f"id={given!r} does not fit the key of {topic.table}: "
                f"{', '.join(topic.key) or 'it has none'}."
            )
        return key

    def _check_names(self, topic: Topic, values: Mapping[str, Any], old: Mapping[str, Any]) -> None:
        if old and topic.op != "updated":
            raise ConfigurationError(f"old={dict(old)!r} with {topic.op!r}: only updates have it.")
        for option, names, known in (
            ("values", values, topic.values),
            ("old", old, (*topic.key, *topic.values)),
        ):
            for name in names:
                if name not in known:
                    raise ConfigurationError(
                        f"{option} has {name!r}, which no event of this watcher carries"
                        f"{near(name, known)} It carries {', '.join(known) or 'its key only'}; "
                        f"add extra=[{name!r}] to the watcher."
                    )

    def _load(self, model: Any, ids: Sequence[tuple[Any, ...]]) -> list[Any]:
        found = []
        for key in ids:
            record = self._records.get((model_identity(model), hashable(key)), _UNSAID)
            if record is _UNSAID:
                raise ConfigurationError(
                    f"The simulation does not know {model_name(model)} {key!r}: give it with "
                    "emit(…, record=…), None for a record that is gone."
                )
            if record is not None:
                found.append(record)
        return found

    def _note_error(self, hub: Hub, *, error: BaseException, **_: Any) -> None:
        self._errors.append(error)

    def _raise_first(self) -> None:
        errors, self._errors = self._errors, []
        if errors:
            raise errors[0]
