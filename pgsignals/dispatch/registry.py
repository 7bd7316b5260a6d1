"""The receivers of a Hub: ``on``, ``subscribe``, the blinker signals, the per-record index."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, TypeVar

from blinker import Signal

from ..core.errors import ReceiverError, near
from ..core.events import Event, Topic, model_identity, model_name
from ..core.logging import log
from ..core.process import notice_fork
from ..core.redaction import legible
from ..core.watchers import EVENT_OPERATIONS
from .coroutines import CoroutineReceiver, Coroutines, is_coroutine_function
from .filter_values import converted

Receiver = Callable[[Event], object]
# The name of a dead letter's receiver is a part of an index, whose entries are bounded.
_LONGEST_NAME = 300
R = TypeVar("R", bound=Callable[..., object])
Key = tuple["int | str", str]
Later = Literal["wait", "follow"]
# Makes the context in which a receiver is called, such as an application context.
Around = Callable[[], AbstractContextManager[object]]

# The receiver that is being called in this thread, where delivery is durable.
called: ContextVar[Any] = ContextVar("pgsignals_called", default=None)


@dataclass(frozen=True)
class Retrying:
    """The policy for an event in durable delivery whose receiver raises.

    The receiver is called again up to ``retries`` times, the first time after ``backoff`` seconds,
    then after twice as long each time, a minute at most; then the event is kept as a dead letter,
    or logged and passed over where it came from a broker.
    ``later`` events of the same record ``"wait"`` until then, or ``"follow"`` at once.
    """

    retries: int = 4
    backoff: float = 0.5
    later: Later = "wait"

    def __post_init__(self) -> None:
        if not isinstance(self.retries, int) or self.retries < 0:
            raise ReceiverError(f"retries={self.retries!r}: give a whole number from 0.")
        if not isinstance(self.backoff, int | float) or self.backoff < 0:
            raise ReceiverError(f"backoff={self.backoff!r}: give seconds, from 0.")
        if self.later not in ("wait", "follow"):
            raise ReceiverError(f"later={self.later!r}: it is 'wait' or 'follow'.")

    def delay(self, tries: int) -> float:
        """Return the seconds before the next try, after so many."""
        return float(min(60.0, self.backoff * 2 ** min(tries - 1, 32)))


DEFAULT_RETRYING = Retrying()


class Subscription:
    """A receiver that listens; ``cancel()`` ends it."""

    __slots__ = (
        "_cancel",
        "active",
        "asked",
        "collects",
        "filters",
        "fn",
        "name",
        "ops",
        "retrying",
        "target",
    )

    def __init__(
        self,
        fn: Receiver,
        target: Any,
        ops: tuple[str, ...],
        filters: dict[str, Any],
        cancel: Callable[[Subscription], None],
        name: str,
        collects: bool = False,
        retrying: Retrying = DEFAULT_RETRYING,
    ) -> None:
        self.fn = fn
        self.name = name
        self.target = target
        self.ops = ops
        # As they were given, and by the types that the columns have.
        self.asked = self.filters = filters
        self.active = True
        self.collects = collects
        self.retrying = retrying
        self._cancel = cancel

    def cancel(self) -> None:
        """End the subscription: no call begins any more, except one that a worker had begun."""
        notice_fork()
        self.active = False
        self._cancel(self)

    def __call__(self, sender: Any, *, event: Event) -> object:
        """Call the receiver, as blinker does."""
        return self.fn(event) if self.active else None

    def __repr__(self) -> str:
        return f"<Subscription of {self.name} to {_described(self.target, self.ops)}>"


class Registry:
    """All receivers of one Hub.

    Before the Hub starts, receivers are only remembered. ``bind`` checks them against the topics
    that the watchers deliver; from then on a receiver that no event could reach is refused.
    What filters ask for is converted to the types of the topics' columns.
    """

    def __init__(self) -> None:
        self.coroutines = Coroutines()
        self._lock = threading.RLock()
        self._listeners: dict[Key, _Listeners] = {}
        self._subscriptions: dict[Subscription, None] = {}
        self._topics: Sequence[Topic] | None = None
        self._retried = True
        self.observers: tuple[Callable[[Sequence[Event]], None], ...] = ()
        # The Hub sets it when it starts, and removes it when it stops.
        self.around: Around | None = None
        self._names: dict[Key, tuple[int | str, ...]] = {}
        # The listeners of a topic, found once, since they are needed for each message.
        self._routes: dict[Topic, list[_Listeners]] = {}
        self._come = 0

    def subscribe(
        self,
        fn: Receiver,
        target: Any,
        ops: tuple[str, ...],
        filters: dict[str, Any],
        name: str | None = None,
        collects: bool = False,
        retrying: Retrying = DEFAULT_RETRYING,
    ) -> Subscription:
        """Call ``fn`` with each event of the model or label and the operations.

        ``name`` is the receiver's in log lines and errors, if not the function's. A receiver that
        ``collects`` only keeps the event for another.
        Raises ReceiverError when ``fn`` cannot be called so, or no watcher delivers such events.
        """
        check_receiver(fn)
        for op in ops:
            _check_operation(op)
        subscription = Subscription(
            self.callable_by_threads(fn),
            target,
            ops,
            filters,
            self._remove,
            name or f"receiver {receiver_name(fn)}",
            collects,
            retrying,
        )
        try:
            hash(tuple(filters.values()))
        except TypeError:
            raise ReceiverError(
                f"The {subscription.name} asks for {filters!r}: only values that hash can be asked "
                "for."
            ) from None
        with self._lock:
            subscription.filters = self._check(subscription)
            for key in _keys(subscription):
                listeners = self._listeners_of(key, target)
                if filters:
                    listeners.index.add(subscription)
                else:
                    listeners.signal.connect(subscription, weak=False)
                    listeners.subscribed[id(subscription)] = subscription
            self._subscriptions[subscription] = None
            self._come += 1
        log.debug("the %s listens to %s", subscription.name, _described(target, ops))
        return subscription

    def callable_by_threads(self, fn: Callable[..., Any]) -> Callable[[Any], object]:
        """Return ``fn``; for a coroutine function, a function that runs it on the loop."""
        return CoroutineReceiver(fn, self.coroutines) if is_coroutine_function(fn) else fn

    def signal(self, target: Any, op: str) -> Signal:
        """Return the blinker signal of a model or label and an operation."""
        _check_operation(op)
        with self._lock:
            if self._topics is not None:
                self._check_delivered(f"signal({model_name(target)}, {op!r})", target, (op,))
            return self._listeners_of((model_identity(target), op), target).signal

    def bind(
        self, topics: Sequence[Topic], *, delivered: bool = True, retried: bool = True
    ) -> None:
        """Check all receivers against the topics, and deliver by these from now on.

        Topics that are not ``delivered`` are only known by their names. ``retried`` says whether
        anybody calls a receiver again that has raised. Raises ReceiverError, and then nothing has
        changed.
        """
        with self._lock:
            before = self._topics, self._names
            # A column may get another type while events are delivered: a filter that matches
            # nothing any more must not keep them from all others.
            running = self._topics is not None
            self._retried = retried
            self._topics = tuple(topics) if delivered else ()
            # Former topics stay known: after a reconnection, events of them may still be queued.
            self._names = self._names | _names(topics)
            self._routes.clear()
            try:
                filters = {each: self._check(each, running) for each in self._subscriptions}
                for (_, op), each in self._listeners.items():
                    if any(not isinstance(r, Subscription) for r in each.signal.receivers.values()):
                        self._check_delivered(
                            f"signal({model_name(each.target)}, {op!r})", each.target, (op,)
                        )
            except ReceiverError:
                self._topics, self._names = before
                self._routes.clear()
                raise
            for subscription, found in filters.items():
                if found != subscription.filters:
                    self._index(subscription, found)

    @property
    def subscriptions(self) -> list[Subscription]:
        """All subscriptions."""
        with self._lock:
            return list(self._subscriptions)

    def everybody(self) -> list[Any]:
        """Return all receivers, be it through a subscription or a blinker signal."""
        with self._lock:
            listening: dict[int, Any] = {id(each): each for each in self._subscriptions}
            for listeners in self._listeners.values():
                for each in list(listeners.signal.receivers.values()):
                    found = each() if isinstance(each, weakref.ref) else each
                    if found is not None:
                        listening.setdefault(id(found), found)
        return list(listening.values())

    @property
    def arrivals(self) -> tuple[int, int]:
        """The subscriptions ever made, and blinker's receivers: another value after an arrival."""
        with self._lock:
            return self._come, sum(len(x.signal.receivers) for x in self._listeners.values())

    @property
    def has_delivered(self) -> bool:
        """Whether the receivers of an event have been looked up since the last subscription."""
        return bool(self._routes)

    def is_alone(self, receiver: Any) -> bool:
        """Whether this is the only receiver, be it through a subscription or a blinker signal."""
        return all(each == receiver for each in self.everybody())

    def label(self, receiver: Any) -> str:
        """Return a receiver's name that is the same in later processes, with a number if needed.

        Of several receivers with one name, the later ones get a number. The label is ASCII, which
        every database can hold.
        """
        name = receiver_name(receiver)
        alike = [each for each in self.everybody() if receiver_name(each) == name]
        number = next((n for n, each in enumerate(alike, 1) if each == receiver), 1)
        ascii_name = name.encode("ascii", "backslashreplace").decode()
        return ascii_name if number == 1 else f"{ascii_name}#{number}"

    def unbind(self) -> None:
        """Forget the topics; receivers stay for the next start."""
        with self._lock:
            # The names stay: events that somebody has kept can still be matched by them.
            self._topics = None

    def admit(self, topic: Topic) -> None:
        """Deliver a topic without ``bind``, which would check all receivers.

        Raises ReceiverError when a receiver asks for a column that the topic does not have.
        """
        with self._lock:
            self._names |= (found := _names([topic]))
            names = found[_key(topic)]
            self._routes.clear()
            for subscription in self._subscriptions:
                if model_identity(subscription.target) in names and (
                    not subscription.ops or topic.op in subscription.ops
                ):
                    _check_filters(subscription, topic)

    def names(self, topic: Topic) -> tuple[int | str, ...]:
        """Return the names by which receivers may call the topic's model or watcher."""
        return self._names.get(_key(topic), ())

    def matcher(
        self, target: Any, ops: tuple[str, ...], filters: dict[str, Any]
    ) -> Callable[[Event], bool]:
        """Return a function that says whether such a receiver would get an event.

        Raises ReceiverError where ``subscribe`` does.
        """
        for op in ops:
            _check_operation(op)
        wanted = Subscription(_nothing, target, ops, filters, _nothing, "question")
        with self._lock:
            wanted.filters = self._check(wanted)
        identity = model_identity(target)
        index = _Index()
        index.add(wanted)

        def matches(event: Event) -> bool:
            topic = event._message.topic
            if identity not in self.names(topic) or (ops and topic.op not in ops):
                return False
            known = ("id", *topic.key, *topic.values)
            return all(name in known for name in filters) and bool(index.find(event))

        return matches

    def _index(self, subscription: Subscription, filters: dict[str, Any]) -> None:
        """Put a subscription into the indexes by other values."""
        indexes = [self._listeners[key].index for key in _keys(subscription)]
        for each in indexes:
            each.remove(subscription)
        subscription.filters = filters
        for each in indexes:
            each.add(subscription)

    def forked(self) -> None:
        """In the child of a fork, renew the lock, which a thread that is not there may hold."""
        self._lock = threading.RLock()
        self.coroutines.forked()
        self._topics = None

    def receivers(self, topic: Topic) -> tuple[list[Any], list[_Index]]:
        """Return the receivers of every event of the topic, and the indexes of those of some."""
        everybody: list[Any] = []
        indexes: list[_Index] = []
        with self._lock:
            if (route := self._routes.get(topic)) is None:
                named = [self._listeners.get((name, topic.op)) for name in self.names(topic)]
                route = self._routes[topic] = [each for each in named if each is not None]
            for each in route:
                if connected := each.signal.receivers:
                    # By far the most common case: all came by ``subscribe``. Blinker's own search
                    # would take longer than all that comes before it.
                    if each.subscribed == connected:
                        everybody += connected.values()
                    else:
                        everybody += each.signal.receivers_for(topic.model)
                if each.index.by_columns:
                    indexes.append(each.index)
        return everybody, indexes

    def calls(self, events: Sequence[Event]) -> Iterator[tuple[Event, Any]]:
        """Return the calls of receivers for events of one topic; several threads may take them.

        The observers see the events once the last call has been made.
        """
        everybody, indexes = self.receivers(events[0]._message.topic)
        if indexes or self.observers or log.isEnabledFor(logging.DEBUG):
            return _calls(self, events, everybody, indexes)
        # The most common case: a generator would cost more than all the rest.
        return product(events, everybody)

    def _listeners_of(self, key: Key, target: Any) -> _Listeners:
        if (found := self._listeners.get(key)) is None:
            found = self._listeners[key] = _Listeners(target, key[1])
            self._routes.clear()
        return found

    def _remove(self, subscription: Subscription) -> None:
        with self._lock:
            if self._subscriptions.pop(subscription, False) is False:
                return
            for key in _keys(subscription):
                listeners = self._listeners[key]
                if subscription.filters:
                    listeners.index.remove(subscription)
                else:
                    listeners.signal.disconnect(subscription)
                    listeners.subscribed.pop(id(subscription), None)

    def _check(self, subscription: Subscription, running: bool = False) -> dict[str, Any]:
        """Return the values of a subscription's filters by the columns' types.

        Raises ReceiverError; for a value that no column has, only if events are not ``running``.
        """
        filters = subscription.asked
        if self._topics is None:
            return filters
        who = f"The {subscription.name}"
        self.check_loop(subscription.name, subscription.fn)
        if not self._retried:
            _check_never_retried(subscription)
        for topic in self._check_delivered(who, subscription.target, subscription.ops):
            _check_filters(subscription, topic)
            try:
                filters = {
                    name: _value(subscription, topic, name, value)
                    for name, value in filters.items()
                }
            except ReceiverError as error:
                if not running:
                    raise
                log.warning("a receiver gets no event any more: %s", error)
        return filters

    def check_loop(self, name: str, fn: object) -> None:
        """Raise ReceiverError for a coroutine function without a loop to run it on."""
        if _is_coroutine(fn) and not self.coroutines.ready:
            raise ReceiverError(
                f"The {name} is a coroutine function, and there is no event loop to run it on: "
                "call start() where the loop runs, or give start(loop=…)."
            )

    def _check_delivered(self, who: str, target: Any, ops: tuple[str, ...]) -> list[Topic]:
        topics = self._topics or ()
        identity = model_identity(target)
        named = [topic for topic in topics if identity in self._names[_key(topic)]]
        delivered = {topic.op for topic in named}
        missing = [op for op in ops if op not in delivered]
        if named and not missing:
            return [topic for topic in named if not ops or topic.op in ops]
        raise _undelivered(who, target, tuple(missing) or ops, named, topics)


def _calls(
    registry: Registry, events: Sequence[Event], everybody: list[Any], indexes: list[_Index]
) -> Iterator[tuple[Event, Any]]:
    verbose = log.isEnabledFor(logging.DEBUG)
    for event in events if everybody or indexes else ():
        receivers = everybody
        for index in indexes:
            receivers = [*receivers, *index.find(event)]
        if verbose:
            log.debug(
                "delivering %r to %d receivers",
                event,
                len(receivers),
                extra={"event_uid": event.uid, **event._message.topic.fields},
            )
        for receiver in receivers:
            yield event, receiver
    for observer in registry.observers:
        observer(events)


def _undelivered(
    who: str, target: Any, ops: tuple[str, ...], named: Sequence[Topic], topics: Sequence[Topic]
) -> ReceiverError:
    wanted = _described(target, ops)
    if named and ops == ("snapshot",):
        nearest = ", ".join(_topic_text(topic) for topic in named)
        fix = 'start with delivery="outbox" and name=, whose backfill() delivers snapshots'
    elif named:
        nearest = ", ".join(_topic_text(topic) for topic in named)
        fix = f"add {ops[0]!r} to that watcher"
    else:
        nearest = _nearest(target, topics)
        fix = f"add {model_name(target)} to the watchers" if topics else "add a watcher"
    return ReceiverError(
        f"{who} listens to {wanted}, which no watcher delivers. "
        f"{f'The nearest: {nearest}' if nearest else 'There are no watchers'}; {fix}, or "
        "listen to what is delivered."
    )


def _check_never_retried(subscription: Subscription) -> None:
    retrying = getattr(subscription.fn, "retrying", subscription.retrying)
    # Without retries there is nothing to miss.
    if retrying != DEFAULT_RETRYING and retrying.retries:
        raise ReceiverError(
            f"The {subscription.name} has retries=, backoff= or later=, and nobody calls it again "
            'here: leave them out, or start with delivery="outbox" or "wal" (a name= at a broker), '
            "which keep an event until its receivers have returned."
        )


def _check_filters(subscription: Subscription, topic: Topic) -> None:
    known = tuple(dict.fromkeys(("id", *topic.key, *topic.values)))
    for name in subscription.filters:
        if name not in known:
            if subscription.filters[name] in EVENT_OPERATIONS:
                raise ReceiverError(
                    f"The {subscription.name} asks for {name}={subscription.filters[name]!r}: an "
                    "operation comes behind the model, without a name: "
                    f"{_described(subscription.target, (subscription.filters[name],))}."
                )
            raise ReceiverError(
                f"The {subscription.name} asks for {name}=…, which events of {_topic_text(topic)} "
                f"do not carry{near(name, known)} They carry {', '.join(known)}; add "
                f"extra=[{name!r}] to the watcher."
            )


def _value(subscription: Subscription, topic: Topic, name: str, value: Any) -> Any:
    """Return what a filter asks for by the type of its column. Raises ReceiverError."""
    names: tuple[str, ...] = (name,)
    values: Sequence[Any] = (value,)
    if name == "id" and "id" not in topic.types:
        names = topic.key
        if len(names) > 1:
            if value is not None and not (isinstance(value, tuple) and len(value) == len(names)):
                raise ReceiverError(
                    f"The {subscription.name} asks for id={value!r}, and the key of "
                    f"{_topic_text(topic)} is ({', '.join(names)}): give a tuple of so many values."
                )
            values = value or ()
    found = []
    for column, each in zip(names, values, strict=False):
        kind = topic.types.get(column)
        try:
            found.append(converted(each, kind))
        except ValueError:
            raise ReceiverError(
                f"The {subscription.name} asks for {name}={value!r}, which no event of "
                f"{_topic_text(topic)} has: {column} is of type {kind}."
            ) from None
    return value if not found else tuple(found) if len(names) > 1 else found[0]


def _nothing(_: object) -> None:
    """Do nothing, where a function must be given."""


class _Listeners:
    """Receivers of an operation of a model or label: of all records, or by the index of some."""

    def __init__(self, target: Any, op: str) -> None:
        self.target = target  # Keeps the model alive, since its id is the key.
        self.signal = Signal(f"{model_name(target)} {op}")
        # The subscriptions, as the signal has them if nobody else has connected to it.
        self.subscribed: dict[Any, Any] = {}
        self.index = _Index()


class _Index:
    """Subscriptions to single records: found by value, however many there are."""

    def __init__(self) -> None:
        self.by_columns: dict[tuple[str, ...], dict[Any, dict[Subscription, None]]] = {}

    def add(self, subscription: Subscription) -> None:
        columns, wanted = _filter_key(subscription)
        by_value = self.by_columns.setdefault(columns, {})
        by_value.setdefault(wanted, {})[subscription] = None

    def remove(self, subscription: Subscription) -> None:
        columns, wanted = _filter_key(subscription)
        by_value = self.by_columns[columns]
        del by_value[wanted][subscription]
        if not by_value[wanted]:
            del by_value[wanted]
        if not by_value:
            del self.by_columns[columns]

    def find(self, event: Event) -> list[Subscription]:
        """Return the subscriptions to this record, by its new or by its former values."""
        found: dict[Subscription, None] = {}
        for columns, by_value in list(self.by_columns.items()):
            for wanted in _event_values(event, columns):
                if wanted is _UNKNOWN:
                    for subscriptions in list(by_value.values()):
                        found.update(subscriptions)
                    continue
                try:
                    found.update(by_value.get(wanted, {}))
                # A value that does not hash, which nobody could have asked for; or a filter's value
                # that raises when it is compared.
                except Exception:
                    continue
        return list(found)


_UNKNOWN = object()


def _event_values(event: Event, columns: tuple[str, ...]) -> Iterator[Any]:
    """Yield the event's values of the columns: the new ones, and the former ones if they differ.

    A value that was too long to be sent could be any: all who asked for such a column get the
    event, which says that it is truncated.
    """
    message = event._message
    topic, row = message.topic, event._row
    width = len(topic.key)
    new: list[Any] = []
    old: list[Any] = []
    for name in columns:
        if name == "id" and "id" not in topic.key and "id" not in topic.values:
            new.append(row[0] if width == 1 else row[:width])
            before = row[width : 2 * width] if message.moved else row[:width]
            old.append(before[0] if width == 1 else before)
        elif name in topic.key:
            at = topic.key.index(name)
            new.append(row[at])
            old.append(row[width + at] if message.moved else row[at])
        elif message.truncated:
            yield _UNKNOWN
            return
        else:
            at = message.values_start + topic.values.index(name)
            new.append(row[at])
            old.append(row[at + len(topic.values)] if topic.compared else row[at])
    yield tuple(new)
    if old != new:
        yield tuple(old)


def _filter_key(subscription: Subscription) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    columns = tuple(sorted(subscription.filters))
    return columns, tuple(subscription.filters[name] for name in columns)


def _keys(subscription: Subscription) -> list[Key]:
    identity = model_identity(subscription.target)
    return [(identity, op) for op in subscription.ops or EVENT_OPERATIONS]


def _key(topic: Topic) -> Key:
    """Return the key of a topic in a Hub, which stays the same when its definition changes."""
    return (topic.label if topic.label is not None else model_identity(topic.model), topic.op)


def _names(topics: Sequence[Topic]) -> dict[Key, tuple[int | str, ...]]:
    """Return the names by which receivers may call the topics' watchers, by the topics' keys."""
    labels = {topic.label for topic in topics}
    schemas: dict[str, set[str]] = {}
    for topic in topics:
        schemas.setdefault(topic.table, set()).add(topic.schema)
    found: dict[Key, tuple[int | str, ...]] = {}
    for topic in topics:
        if topic.label is not None:
            found[_key(topic)] = (topic.label,)
            continue
        names = [model_identity(topic.model), f"{topic.schema}.{topic.table}"]
        if len(schemas[topic.table]) == 1:
            names.append(topic.table)
        found[_key(topic)] = tuple(dict.fromkeys(name for name in names if name not in labels))
    return found


def _check_operation(op: object) -> None:
    if op not in EVENT_OPERATIONS:
        raise ReceiverError(
            f"{op!r} is not an operation{near(str(op), EVENT_OPERATIONS)} "
            f"Operations are {', '.join(map(repr, EVENT_OPERATIONS))}."
        )


def check_receiver(fn: object, given: str = "the event") -> None:
    """Raise ReceiverError for what cannot be called with one argument, ``given``, or does nothing.

    A generator function only makes a generator when it is called, whose body nobody would run.
    """
    if not callable(fn):
        raise ReceiverError(f"{fn!r} cannot be called: give a function that takes {given}.")
    name = receiver_name(fn)
    called_by = getattr(type(fn), "__call__", None)  # noqa: B004 - the method is wanted
    if any(
        inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each)
        for each in (fn, called_by)
    ):
        raise ReceiverError(
            f"The receiver {name} has a yield in it, so that a call would not run it: return "
            "instead, or iterate over stream()."
        )
    try:
        signature = inspect.signature(fn)
    # Of some callables that are not written in Python nobody knows what they take.
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ReceiverError(
            f"The receiver {name}{signature} cannot be called with {given} alone: {error}."
        ) from None


def check_target(target: object, method: str) -> None:
    """Raise ReceiverError where a decorator has got the function in place of its arguments."""
    if inspect.isroutine(target) or isinstance(target, functools.partial):
        raise ReceiverError(
            f"@{method} above {receiver_name(target)} has no model: write @{method}(Model), "
            f'@{method}("table") or @{method}("label", "updated").'
        )


def _is_coroutine(fn: object) -> bool:
    # A Batcher has the coroutine function as its ``fn``.
    return isinstance(fn, CoroutineReceiver) or isinstance(
        getattr(fn, "fn", None), CoroutineReceiver
    )


def receiver_name(fn: object) -> str:
    """Return the name of a receiver for log lines and errors: ``module.function``."""
    if isinstance(fn, Subscription):
        fn = fn.fn
    if isinstance(fn, functools.partial):
        fn = fn.func
    try:
        # A callable object has the name of its class: its repr has an address, which differs in
        # each process.
        name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
        return legible(f"{getattr(fn, '__module__', '?')}.{name}", _LONGEST_NAME)
    # Anything can be connected to a signal, and its attributes may raise anything.
    except Exception:
        return f"?.{type(fn).__qualname__}"


def event_text(event: Event) -> str:
    """Return what an event is about, for log lines: table, operation, key and uid."""
    topic = event._message.topic
    try:
        key = legible(repr(event.id), 100)
    # The repr of a value that a typecaster of the user's has made may raise anything.
    except Exception:
        key = "?"
    return f"{topic.schema}.{topic.table} {topic.op} id={key} (event {event.uid})"


def _described(target: object, ops: tuple[str, ...]) -> str:
    name = repr(target) if isinstance(target, str) else model_name(target)
    return f"({', '.join((name, *map(repr, ops)))})" if ops else name


def _topic_text(topic: Topic) -> str:
    return _described(topic.label if topic.label is not None else topic.model, (topic.op,))


def _nearest(target: object, topics: Sequence[Topic]) -> str:
    same_model = [t for t in topics if t.model is target]
    if same_model:
        return ", ".join(_topic_text(topic) for topic in same_model)
    named: dict[str, list[Topic]] = {}
    for topic in topics:
        name = topic.label if topic.label is not None else model_name(topic.model)
        named.setdefault(name, []).append(topic)
    if not named:
        return ""
    best = difflib.get_close_matches(model_name(target), list(named), n=1, cutoff=0.0)
    found = named[best[0]] if best else next(iter(named.values()))
    first = found[0].label if found[0].label is not None else found[0].model
    return _described(first, tuple(topic.op for topic in found))
