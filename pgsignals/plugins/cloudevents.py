"""Events on the wire to and from brokers: CloudEvents 1.0 in binary mode, without any I/O.

An event has attributes, which become headers, and data, which is JSON. JSON lacks most types that
PostgreSQL has: a value of such a type travels as PostgreSQL would read it, and ``types`` names the
type, so that a reader without a database has the same Python value again.
``docs/wire-format.md`` is the contract.
"""

from __future__ import annotations

import functools
import json
import math
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import msgspec
from psycopg2.extras import DateRange, DateTimeRange, DateTimeTZRange, NumericRange, Range

from ..core.errors import PayloadError
from ..core.events import Event, Gap, Message, Topic, microseconds, read_time
from ..core.watchers import EVENT_OPERATIONS

SPEC_VERSION = "1.0"
SCHEMA = "urn:pgsignals:event:1"
TYPE_PREFIX = "pgsignals."
GAP_TYPE = "pgsignals.gap"
CONTENT_TYPE = "application/json"

# The attributes of a trace; see https://github.com/cloudevents/spec, distributed tracing.
_TRACE = ("traceparent", "tracestate")
_TRACE_VALUE = re.compile(r"[\x21-\x7e]{1,512}")


class Writer:
    """Makes CloudEvents of events. ``source`` is a URI reference that names their origin."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._latest: tuple[Message | None, dict[str, str]] = None, {}

    def attributes(self, event: Event) -> dict[str, str]:
        """Return the attributes, without the prefix that a protocol puts before their names."""
        message, common = self._latest
        if message is not event._message:
            # All but the id are the same for the events of a message, which come together.
            common = self._common(event)
            self._latest = event._message, common
        found = common.copy()
        found["id"] = event.uid
        return found

    def _common(self, event: Event) -> dict[str, str]:
        subject = f"{event.schema}.{event.table}"
        found = self._attributes(TYPE_PREFIX + event.op, event.at, subject=subject)
        if context := event.context:
            for name in _TRACE:
                value = context.get(name)
                if isinstance(value, str) and _TRACE_VALUE.fullmatch(value):
                    found[name] = value
        return found

    def data(self, event: Event, *, key_only: bool = False) -> bytes:
        """Return the data; with ``key_only``, without values and context, marked as truncated."""
        truncated = key_only or event.truncated
        op = event.op
        old = event.old if op == "updated" else {}
        key, types = _portable(event.key)
        found: dict[str, Any] = {
            "op": op,
            "schema": event.schema,
            "table": event.table,
            "key": key,
        }
        if (label := event.label) is not None:
            found["label"] = label
        if truncated:
            # The former values of a changed key stay, since they belong to the key.
            old = {name: value for name, value in old.items() if name in key}
            found["truncated"] = True
        else:
            found["values"], of_values = _portable(event.values)
            types.update(of_values)
        if old:
            found["old"], of_old = _portable(old)
            if of_old != {name: tag for name, tag in types.items() if name in old}:
                found["old_types"] = of_old
        if op == "updated":
            found["changed"] = sorted(n for n in event.changed if not truncated or n in key)
        if types:
            found["types"] = types
        found["txid"] = event.txid
        if event.context and not key_only:
            found["context"] = dict(event.context)
        return _encode(found)

    def gap(self, gap: Gap) -> tuple[dict[str, str], bytes]:
        """Return the attributes and the data of a Gap, for the subscribers behind a broker."""
        data = _encode(
            {
                "since": _time_text(gap.since),
                "until": _time_text(gap.until),
                "reason": gap.reason,
                "detail": gap.detail,
            }
        )
        # The id is the same whenever the Gap is sent again, as that of an event is.
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._source} {data!r}")
        return self._attributes(GAP_TYPE, gap.until, identity.hex), data

    def _attributes(self, kind: str, at: datetime, uid: str = "", **more: str) -> dict[str, str]:
        return {
            "specversion": SPEC_VERSION,
            "id": uid,
            "source": self._source,
            "type": kind,
            **more,
            "time": _time_text(at),
            "datacontenttype": CONTENT_TYPE,
            "dataschema": SCHEMA,
        }


@functools.cache
def header_name(attribute: str, prefix: str) -> str:
    """Return the name of an attribute's header in a protocol whose attributes have a prefix."""
    return "content-type" if attribute == "datacontenttype" else prefix + attribute


def attributes_of(headers: Iterable[tuple[str, str]], prefix: str) -> dict[str, str]:
    """Return the attributes in the headers of a protocol, the inverse of :func:`header_name`."""
    found = {}
    for name, text in headers:
        if name == "content-type":
            found["datacontenttype"] = text
        elif name.startswith(prefix):
            found[name.removeprefix(prefix)] = text
    return found


def record_key(event: Event) -> bytes | None:
    """Return the record's key as JSON: a value, or an array for a key of several columns.

    Return None without a key. The text is the same for all events of a record, by any watcher.
    """
    return _key_text(tuple(event.key.values()))


def former_record_key(event: Event) -> bytes | None:
    """Return the former key of an update that changed it, which no record has any more, or None."""
    old, key = event.old, event.key
    former = tuple(old.get(name, value) for name, value in key.items())
    return _key_text(former) if former != tuple(key.values()) else None


def _key_text(key: tuple[Any, ...]) -> bytes | None:
    if not key:
        return None
    if len(key) == 1 and type(key[0]) in (int, str):
        return _encode(key[0])
    values = [_convert(value)[0] for value in key]
    return _encode(values[0] if len(values) == 1 else values)


class _Data(msgspec.Struct):
    """The fields of the data that readers know; those of a later version are ignored."""

    op: str
    schema: str
    table: str
    key: dict[str, Any]
    txid: int
    label: str | None = None
    values: dict[str, Any] = {}
    old: dict[str, Any] = {}
    changed: frozenset[str] = frozenset()
    types: dict[str, str] = {}
    old_types: dict[str, str] | None = None
    truncated: bool = False
    context: dict[str, Any] = {}


class _GapData(msgspec.Struct):
    since: str
    until: str
    reason: str
    detail: str = ""


class _ReceivedMessage(Message):
    """A message of one event from a broker, which keeps the uid that it had at its origin."""

    origin: str = ""

    def uid(self, number: int) -> str:
        return self.origin

    def alone(self, number: int) -> Message:
        return msgspec.structs.replace(self, rows=[self.rows[number]], page=None)


class Received(_Data, kw_only=True):
    """An event as it came from a broker, before it is given a model here."""

    uid: str
    at_us: int

    @property
    def compared(self) -> bool:
        """Whether the event has old values, as updates of watchers with columns do."""
        return self.op == "updated" and bool(self.values)

    def message(self, topic: Topic, position: str | None, redelivered: bool) -> Message:
        """Return the event's message for a topic that has its key and values, by whatever names."""
        key = tuple(self.key.values())
        former = tuple(self.old.get(name, value) for name, value in self.key.items())
        # A column that is in the key and among the values is in ``old`` though it did not change.
        moved = any(name in self.old and name in self.changed for name in self.key)
        row = [*key, *(former if moved else ())]
        if not self.truncated:
            row += self.values.values()
            if topic.compared:
                row += [self.old.get(name, value) for name, value in self.values.items()]
                row.append("".join("01"[name in self.changed] for name in self.values))
        return _ReceivedMessage(
            topic,
            self.txid,
            0,
            self.at_us,
            self.context,
            [tuple(row)],
            moved,
            self.truncated,
            redelivered=redelivered,
            position=position,
            origin=self.uid,
        )


def read(attributes: Mapping[str, str], data: bytes | None) -> Received | Gap:
    """Return the event or Gap of a CloudEvent of ours; attributes come without a prefix.

    Raises PayloadError for what pgsignals did not write, or wrote in a later, other format.
    """
    try:
        if attributes["specversion"] != SPEC_VERSION:
            raise PayloadError(
                f"specversion {attributes['specversion']} of CloudEvents, not {SPEC_VERSION}"
            )
        if attributes.get("dataschema", SCHEMA) != SCHEMA:
            raise PayloadError(
                f"the format {attributes['dataschema']}, and this version of pgsignals reads "
                f"{SCHEMA}: install the version that the sender has"
            )
        if attributes["type"] == GAP_TYPE:
            gap = msgspec.convert(_decode(data), _GapData)
            return Gap(read_time(gap.since), read_time(gap.until), gap.reason, gap.detail)
        found = msgspec.convert(_decode(data), _Data)
        if found.op not in EVENT_OPERATIONS or attributes["type"] != TYPE_PREFIX + found.op:
            raise PayloadError(f"the type {attributes['type']} with the operation {found.op}")
        at_us, uid = microseconds(read_time(attributes["time"])), attributes["id"]
    except KeyError as error:
        raise PayloadError(f"a CloudEvent without the attribute {error}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PayloadError(f"{type(error).__name__}: {error}") from error
    types = found.types
    old_types = types if found.old_types is None else found.old_types
    received = Received(uid=uid, at_us=at_us, **msgspec.structs.asdict(found))
    received.key = _restore_all(found.key, types)
    received.values = _restore_all(found.values, types)
    received.old = _restore_all(found.old, old_types)
    return received


def to_cloudevent(event: Event, source: str) -> tuple[dict[str, str], bytes]:
    """Return the attributes and the data of an event."""
    writer = Writer(source)
    return writer.attributes(event), writer.data(event)


def from_cloudevent(attributes: Mapping[str, str], data: bytes) -> Event:
    """Return the event that a CloudEvent of ours carries, with the table's name as its model.

    Raises PayloadError for anything else.
    """
    received = read(attributes, data)
    if isinstance(received, Gap):
        raise PayloadError("a Gap, not an event")
    topic = Topic(
        model=f"{received.schema}.{received.table}",
        op=received.op,
        label=received.label,
        schema=received.schema,
        table=received.table,
        key=tuple(received.key),
        values=tuple(received.values),
        compared=received.compared,
        loader=lambda session, ids, /, **options: [],
    )
    message = received.message(topic, None, False)
    return Event(message, 0, message.rows[0])


def _portable(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return values as JSON has them, and the types of those for which JSON has no type."""
    found: dict[str, Any] = {}
    types: dict[str, str] = {}
    for name, value in values.items():
        if type(value) in _PLAIN:
            found[name] = value
        else:
            found[name], tag = _convert(value)
            if tag is not None:
                types[name] = tag
    return found, types


_PLAIN = frozenset((str, int, bool, type(None)))


def _convert(value: Any) -> tuple[Any, str | None]:
    """Return one value as JSON has it, and its type if JSON has none for it."""
    kind = type(value)
    if kind in _PLAIN:
        return value, None
    if kind in _TEXTS:
        return _TEXTS[kind](value)
    if kind is float:
        return (value, None) if math.isfinite(value) else (repr(value), "float8")
    if kind is list:
        return _convert_list(value)
    if kind is dict:
        return (value, None) if _is_json(value) else (json.dumps(value, default=str), "json")
    # A caster of the program's own has made the value; the reader gets its text.
    return str(value), None


def _convert_list(value: list[Any]) -> tuple[Any, str | None]:
    """Convert an array, or a list in a json column."""
    leaves = list(_leaves(value))
    kinds = {type(leaf) for leaf in leaves} - {type(None)}
    if kinds <= _PLAIN:
        return value, None
    if len(kinds) == 1 and (kinds <= _TEXTS.keys() or kinds == {float}):
        tags = {tag for leaf in leaves if leaf is not None and (tag := _convert(leaf)[1])}
        if "numrange" in tags:
            tags.discard("int8range")  # The tag that a range without bounds is given.
        if not tags:
            return value, None
        if len(tags) == 1:
            return _each(value, lambda leaf: _convert(leaf)[0]), f"{tags.pop()}[]"
    if _is_json(value):
        return value, None
    return json.dumps(value, default=str), "json"


def _leaves(value: list[Any]) -> Iterator[Any]:
    left: list[Any] = [value]
    while left:
        item = left.pop()
        if type(item) is list:
            left.extend(item)
        else:
            yield item


def _is_json(value: Any) -> bool:
    """Whether JSON can hold ``value`` as it is; even a json column can give infinite numbers."""
    left = [value]
    while left:
        item = left.pop()
        if type(item) is dict:
            left.extend(item.values())
        elif type(item) is list:
            left.extend(item)
        elif type(item) is float:
            if not math.isfinite(item):
                return False
        elif type(item) not in _PLAIN:
            return False
    return True


def _each(value: Any, call: Callable[[Any], Any]) -> Any:
    if type(value) is list:
        return [_each(item, call) for item in value]
    return None if value is None else call(value)


def _interval_text(value: timedelta) -> str:
    # As ISO 8601 has it, and PostgreSQL reads it; each part has its own sign.
    return f"P{value.days}DT{value.seconds}.{value.microseconds:06d}S"


def _bytes_text(value: bytes | bytearray | memoryview) -> str:
    return "\\x" + bytes(value).hex()


def _range(value: Range[Any]) -> tuple[str, str]:
    kind = type(value)
    if kind is NumericRange:
        bounds = (value.lower, value.upper)
        tag = "numrange" if any(type(bound) is Decimal for bound in bounds) else "int8range"
    else:
        tag = _RANGE_TAGS[kind]
    if value.isempty:
        return "empty", tag
    lower, upper = (
        "" if bound is None else str(_convert(bound)[0]) for bound in (value.lower, value.upper)
    )
    opening, closing = "[" if value.lower_inc else "(", "]" if value.upper_inc else ")"
    return f"{opening}{lower},{upper}{closing}", tag


_RANGE_TAGS: dict[type, str] = {
    DateRange: "daterange",
    DateTimeRange: "tsrange",
    DateTimeTZRange: "tstzrange",
}

_TEXTS: dict[type, Callable[[Any], tuple[str, str]]] = {
    uuid.UUID: lambda value: (str(value), "uuid"),
    Decimal: lambda value: (str(value), "numeric"),
    datetime: lambda value: (
        value.isoformat(),
        "timestamp" if value.tzinfo is None else "timestamptz",
    ),
    date: lambda value: (value.isoformat(), "date"),
    time: lambda value: (value.isoformat(), "time" if value.tzinfo is None else "timetz"),
    timedelta: lambda value: (_interval_text(value), "interval"),
    bytes: lambda value: (_bytes_text(value), "bytea"),
    bytearray: lambda value: (_bytes_text(value), "bytea"),
    memoryview: lambda value: (_bytes_text(value), "bytea"),
    NumericRange: _range,
    DateRange: _range,
    DateTimeRange: _range,
    DateTimeTZRange: _range,
}


def _restore_all(values: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    return {name: _restore(value, types.get(name)) for name, value in values.items()}


def _restore(value: Any, tag: str | None) -> Any:
    """Return the Python value again; a value that cannot be made one stays as it came."""
    if tag is None or value is None:
        return value
    try:
        if tag.endswith("[]") and isinstance(value, list):
            return _each(value, _FROM_TEXT[tag[:-2]])
        return _FROM_TEXT[tag](value)
    except (KeyError, ValueError, TypeError, ArithmeticError, AttributeError):
        # A type of a later version, or of the sender's own.
        return value


_INTERVAL = re.compile(r"P(-?\d+)DT(\d+)\.(\d{6})S")


def _read_interval(text: str) -> timedelta:
    found = _INTERVAL.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return timedelta(*map(int, found.groups()))


def _read_bytes(text: str) -> memoryview:
    if not text.startswith("\\x"):
        raise ValueError(text)
    return memoryview(bytes.fromhex(text[2:]))


def _range_reader(
    kind: Callable[..., Any], read_bound: Callable[[str], Any]
) -> Callable[[str], Any]:
    def read_range(text: str) -> Any:
        if text == "empty":
            return kind(empty=True)
        lower, upper = text[1:-1].split(",")
        return kind(
            read_bound(lower) if lower else None,
            read_bound(upper) if upper else None,
            text[0] + text[-1],
        )

    return read_range


_FROM_TEXT: dict[str, Callable[[Any], Any]] = {
    "uuid": uuid.UUID,
    "numeric": Decimal,
    "float8": float,
    "timestamp": datetime.fromisoformat,
    "timestamptz": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timetz": time.fromisoformat,
    "interval": _read_interval,
    "bytea": _read_bytes,
    "json": json.loads,
    "int8range": _range_reader(NumericRange, int),
    "numrange": _range_reader(NumericRange, Decimal),
    "daterange": _range_reader(DateRange, date.fromisoformat),
    "tsrange": _range_reader(DateTimeRange, datetime.fromisoformat),
    "tstzrange": _range_reader(DateTimeTZRange, datetime.fromisoformat),
}


def _time_text(at: datetime) -> str:
    return at.astimezone(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _encode(data: Any) -> bytes:
    try:
        return msgspec.json.encode(data, enc_hook=str)
    # Lone surrogates and integers of more than 64 bits, which a json column can hold.
    except (UnicodeEncodeError, OverflowError):
        return json.dumps(data, default=str, separators=(",", ":")).encode()


def _decode(data: bytes | None) -> Any:
    if not data:
        raise PayloadError("a CloudEvent without data")
    try:
        return msgspec.json.decode(data)
    except msgspec.MsgspecError:
        # msgspec refuses lone surrogates, which _encode() passes on.
        return json.loads(data)
