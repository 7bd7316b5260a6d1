"""The arguments of receivers: Event, Batch and Gap."""

from __future__ import annotations

import asyncio
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import Any, NoReturn, Protocol, TypeVar

import msgspec

from .json import to_plain

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

T = TypeVar("T")


def moment(at_us: int) -> datetime:
    """Return the datetime of so many microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=at_us)


def microseconds(at: datetime) -> int:
    """Return the microseconds since 1970 of an aware datetime."""
    return (at - _EPOCH) // timedelta(microseconds=1)


def read_time(text: str) -> datetime:
    """Return the time of a text in ISO 8601, in UTC unless it has an offset. Raises ValueError."""
    # Python 3.10 cannot read the Z.
    found = datetime.fromisoformat(re.sub(r"[Zz]\Z", "+00:00", text))
    return found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)


class _Columns(dict[str, Any]):
    """Values by column; the error for a column that did not travel says how to have it."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(
            f"{name!r} does not come with this event, which has "
            f"{', '.join(map(repr, self)) or 'no values'}: give the watcher extra=[{name!r}], or "
            "load the record"
        )


class _Cut(_Columns):
    """The columns that are left of a row too long for a notification."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(
            f"{name!r} is of a row too long to travel (event.truncated): load the record"
        )


class Loader(Protocol):
    """Fetches records by their keys through a session of the user's."""

    def __call__(
        self, session: Any, ids: Sequence[tuple[Any, ...]], /, **options: Any
    ) -> list[Any]:
        """Return the records of ``ids``; ``options`` are the user's, for the model's framework."""


def model_name(model: object) -> str:
    """Return a model's name in messages: that of the class, or the text that the user wrote."""
    if isinstance(model, str):
        return model
    name = getattr(model, "__name__", None)
    return name if isinstance(name, str) else str(model)


def model_identity(model: object) -> int | str:
    """Return a value that all mentions of one model share: its ``id()``, or the text."""
    return model if isinstance(model, str) else id(model)


def hashable(key: tuple[Any, ...]) -> Any:
    """Return ``key``, or a text in its place if one of its values (an array, say) does not hash."""
    try:
        hash(key)
    # A value that a typecaster of the user's has made may raise anything.
    except Exception:
        try:
            return repr(key)
        except Exception:
            return "?"  # The same for all such keys: the order of their events is kept.
    return key


@dataclass(frozen=True, eq=False)
class Topic:
    """The attributes that all events of one operation of one watcher have in common.

    ``key`` and ``values`` are attribute names; ``compared`` says that each value comes twice, new
    and old. ``loader`` fetches records by their keys through a session of the user's. ``types`` has
    the names of the built-in types of those columns that have one, where a database is known.
    """

    model: Any
    op: str
    label: str | None
    schema: str
    table: str
    key: tuple[str, ...]
    values: tuple[str, ...]
    compared: bool
    loader: Loader
    name: str = ""
    types: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def scalar(self) -> bool:
        """Whether the key is one column, so that an event's id is its bare value."""
        return len(self.key) == 1

    @cached_property
    def fields(self) -> dict[str, str]:
        """An event's fields in log records and metrics: ``table``, with its schema, and ``op``."""
        return {"table": f"{self.schema}.{self.table}", "op": self.op}


def event_uid(name: str, txid: int, sequence: int, number: int) -> str:
    """Return an event's uid: ``name`` is its topic's, ``number`` counts its message's rows."""
    return f"{name}-{txid:x}-{sequence:x}-{number:x}"


class Message(msgspec.Struct, eq=False):
    """A decoded message: rows of one statement that belong to one topic.

    Each row is a tuple: the key; if ``moved``, the key before the update; unless ``truncated``, the
    values; if the topic compares, the old values, and a text with a ``1`` for each value that
    differs and a ``0`` for each other. The source acknowledges the message with its ``page``.

    ``first`` is the number of the first row. ``payload`` is what was decoded, where nobody holds it
    once the message is acknowledged.
    """

    topic: Topic
    txid: int
    sequence: int
    at_us: int
    context: Mapping[str, Any]
    rows: Sequence[tuple[Any, ...]]
    moved: bool = False
    truncated: bool = False
    first: int = 0
    redelivered: bool = False
    position: str | None = None
    payload: str | None = None
    page: Any = None

    @property
    def values_start(self) -> int:
        """The index in a row at which the values begin."""
        width = len(self.topic.key)
        return 2 * width if self.moved else width

    @property
    def at(self) -> datetime:
        """The time when the statement ran, by the server's clock."""
        return moment(self.at_us)

    def uid(self, number: int) -> str:
        """Return the uid of a row's event, the same here and wherever the event travels."""
        # As event_uid(), without the call: every event that goes to a broker needs its uid.
        return f"{self.topic.name}-{self.txid:x}-{self.sequence:x}-{self.first + number:x}"

    def alone(self, number: int) -> Message:
        """Return a message of this row alone, with the same uid, which nobody acknowledges."""
        return Message(
            self.topic,
            self.txid,
            self.sequence,
            self.at_us,
            self.context,
            [self.rows[number]],
            self.moved,
            self.truncated,
            self.first + number,
            self.redelivered,
            self.position,
        )

    def row_payload(self, number: int) -> str | None:
        """Return the payload of a message of this row alone, with the same uid, to park.

        None if the source itself holds the message, by its ``sequence``.
        """
        if self.payload is None or len(self.rows) == 1:
            return self.payload
        head, *lines = self.payload.split("\n")
        return f'{head[:-1]},"n":{self.first + number}}}\n{lines[number]}'


class Event(msgspec.Struct, frozen=True, eq=False):
    """One change of one record. Its attributes are computed when they are read."""

    _message: Message
    _number: int
    _row: tuple[Any, ...]

    @property
    def op(self) -> str:
        """``inserted``, ``updated``, ``deleted``, ``truncated``, or ``snapshot`` of a backfill."""
        return self._message.topic.op

    @property
    def model(self) -> Any:
        """The model as the watcher gave it."""
        return self._message.topic.model

    @property
    def label(self) -> str | None:
        """The watcher's label, if it has one."""
        return self._message.topic.label

    @property
    def schema(self) -> str:
        """The schema of the watched table."""
        return self._message.topic.schema

    @property
    def table(self) -> str:
        """The name of the watched table, without its schema."""
        return self._message.topic.table

    @property
    def id(self) -> Any:
        """The key's value; a tuple for a key of several columns; None without a key."""
        topic = self._message.topic
        if topic.scalar and self._row:
            return self._row[0]
        return self._row[: len(topic.key)] or None

    @property
    def key(self) -> dict[str, Any]:
        """The key as a mapping of attribute names to values."""
        return dict(zip(self._message.topic.key, self._row, strict=False))

    @property
    def values(self) -> dict[str, Any]:
        """The new values of the watcher's columns; of a deleted record, the last values."""
        message = self._message
        if message.truncated:
            return _Cut()
        return _Columns(zip(message.topic.values, self._row[message.values_start :], strict=False))

    @property
    def old(self) -> dict[str, Any]:
        """The former values that an update has replaced: of ``values``, and of a changed key."""
        message = self._message
        topic = message.topic
        found: dict[str, Any] = _Cut() if message.truncated else _Columns()
        if message.moved:
            found.update(zip(topic.key, self._row[len(topic.key) :], strict=False))
        if topic.compared and not message.truncated:
            start = message.values_start + len(topic.values)
            found.update(zip(topic.values, self._row[start:], strict=False))
        return found

    @property
    def changed(self) -> frozenset[str]:
        """The names that an update has changed, of those in ``values`` and in the key."""
        message = self._message
        topic = message.topic
        found: set[str] = set()
        if message.moved:
            width = len(topic.key)
            found.update(
                name
                for name, new, old in zip(topic.key, self._row, self._row[width:], strict=False)
                if new != old
            )
        if topic.compared and not message.truncated:
            found.update(
                name
                for name, differs in zip(topic.values, self._row[-1], strict=True)
                if differs == "1"
            )
        return frozenset(found)

    @property
    def truncated(self) -> bool:
        """Whether the values were too long to travel, so that only the key is here."""
        return self._message.truncated

    @property
    def txid(self) -> int:
        """The writing transaction's id (``pg_current_xact_id``).

        For a snapshot, the id of the first transaction whose changes it cannot hold.
        """
        return self._message.txid

    @property
    def at(self) -> datetime:
        """The time when the statement ran, by the server's clock, as an aware datetime.

        For a snapshot, the time when the row was read; for a row of the write-ahead log, the time
        when its transaction committed.
        """
        return self._message.at

    @property
    def context(self) -> Mapping[str, Any]:
        """The context that the writer has given by :func:`pgsignals.context`."""
        return self._message.context

    @property
    def uid(self) -> str:
        """The name of this event, the same on every redelivery."""
        return self._message.uid(self._number)

    @property
    def position(self) -> str | None:
        """The position of a durable source after this event; None in ``notify`` delivery."""
        return self._message.position

    @property
    def redelivered(self) -> bool:
        """Whether this event may have been delivered before."""
        return self._message.redelivered

    def load(self, session: Any = None, **options: Any) -> Any:
        """Return the record as it is now, through the user's session; None if it is gone.

        ``session`` is what the model's framework uses: an SQLAlchemy Session or Connection, None
        or a database alias for Django, a psycopg2 connection for a plain table name. ``options``
        say what to load with it: ``options=[selectinload(…)]`` for SQLAlchemy's models,
        ``select_related=`` and ``prefetch_related=`` for Django's.
        Raises ConfigurationError for a session or an option that does not fit the model, and for an
        event without a key.
        """
        topic = self._message.topic
        found = topic.loader(session, [self._row[: len(topic.key)]], **options)
        return found[0] if found else None

    async def aload(self, session: Any = None, **options: Any) -> Any:
        """Like :meth:`load`, for a coroutine.

        ``session`` is an AsyncSession, AsyncConnection or AsyncEngine of SQLAlchemy; for a Django
        model or a plain table name it is what ``load`` takes, and a thread uses it.
        """
        return await _in_background(functools.partial(self.load, **options), session)

    def to_dict(self) -> dict[str, Any]:
        """Return the event as ``json.dumps`` takes it, and as ``pgsignals watch --json`` prints it.

        A value of a type that JSON lacks is its text: a time in ISO 8601, bytes in base64.
        """
        found: dict[str, Any] = to_plain(self._data())
        return found

    def _data(self) -> dict[str, Any]:
        common = ("at", "op", "schema", "table", "id", "key", "values")
        found: dict[str, Any] = {name: getattr(self, name) for name in common}
        if self.op == "updated":
            found["old"] = self.old
            found["changed"] = sorted(self.changed)
        if self.label is not None:
            found["label"] = self.label
        found.update(
            truncated=self.truncated, txid=self.txid, context=dict(self.context), uid=self.uid
        )
        return found

    def _record(self) -> dict[str, Any]:
        return {**self._data(), "old": self.old, "changed": self.changed, "txid": None}

    def __eq__(self, other: object) -> bool:
        return self._record() == other._record() if isinstance(other, Event) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.uid)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the other rows of its message, and what decoded and acknowledges that.
        return Event, (self._message.alone(self._number), 0, self._row)

    def __repr__(self) -> str:
        label = f" {self.label!r}" if self.label is not None else ""
        values = "".join(f" {name}={value!r}" for name, value in self.values.items())
        cut = " truncated" if self.truncated else ""
        return f"<Event{label} {self.schema}.{self.table} {self.op} id={self.id!r}{values}{cut}>"


@dataclass(frozen=True)
class Batch:
    """The latest event of each record that changed in a period."""

    events: tuple[Event, ...]

    @property
    def ids(self) -> list[Any]:
        """The records' ids, in the order of their latest events."""
        return [event.id for event in self.events]

    def load(self, session: Any = None, **options: Any) -> list[Any]:
        """Return the records as they are now, without those gone, by one query for each model.

        For ``session`` and ``options``, see :meth:`Event.load`.
        """
        by_model: dict[int | str, tuple[Loader, list[tuple[Any, ...]]]] = {}
        for event in self.events:
            topic = event._message.topic
            _, ids = by_model.setdefault(model_identity(topic.model), (topic.loader, []))
            ids.append(event._row[: len(topic.key)])
        return [
            record
            for loader, ids in by_model.values()
            for record in loader(session, ids, **options)
        ]

    async def aload(self, session: Any = None, **options: Any) -> list[Any]:
        """Like :meth:`load`, for a coroutine; see :meth:`Event.aload`."""
        return await _in_background(functools.partial(self.load, **options), session)

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)


async def _in_background(load: Callable[[Any], T], session: Any) -> T:
    """Return what ``load`` returns for ``session``, without holding up the event loop."""
    if hasattr(session, "run_sync"):
        found: T = await session.run_sync(load)
        return found
    if hasattr(session, "sync_engine"):
        async with session.connect() as connection:
            return await _in_background(load, connection)
    asgiref = sys.modules.get("asgiref.sync")
    if asgiref is not None:
        # Django's connections belong to threads: this takes that of the program's other async code.
        return await asgiref.sync_to_async(load)(session)  # type: ignore[no-any-return]
    return await asyncio.to_thread(load, session)


@dataclass(frozen=True)
class Gap:
    """A period, by the server's clock: events that were committed in it may be missing.

    An event's ``at`` is when its statement ran, which in a long transaction is before the commit.

    ``reason``: ``reconnected`` (the connection was lost), ``overflow`` (receivers were too slow),
    ``watcher_broken`` (the table no longer fits the trigger; ``detail`` has PostgreSQL's message),
    ``retention`` (the outbox or a broker deleted events before they were read), ``restored`` (the
    outbox's database, or the broker, has another history than the consumer knows),
    ``unknown_name`` (the broker does not know the ``name``: it is new, or its position is gone).
    """

    since: datetime
    until: datetime
    reason: str
    detail: str = field(default="")

    def __post_init__(self) -> None:
        # A clock may have been set back in between.
        if self.until < self.since:
            since, until = self.until, self.since
            object.__setattr__(self, "since", since)
            object.__setattr__(self, "until", until)
