"""Events on the wire to and from brokers: CloudEvents 1.0 in binary mode, without any I/O.

An event has attributes, which become headers, and data, which is JSON. JSON lacks most types that
PostgreSQL has: a value of such a type travels as PostgreSQL would read it, and ``types`` names the
type, so that a reader without a database has the same Python value again.
``docs/wire-format.md`` is the contract.
"""

from __future__ import annotations

import functools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from ..core.errors import PayloadError
from ..core.events import Event, Gap, Message, Topic, microseconds, moment, read_time
from ..core.watchers import EVENT_OPERATIONS
from .portable import convert, encode, restore_all
from .row_json import Form, form

SPEC_VERSION = "1.0"
SCHEMA = "urn:pgsignals:event:1"
TYPE_PREFIX = "pgsignals."
GAP_TYPE = "pgsignals.gap"
CONTENT_TYPE = "application/json"

# The attributes of a trace; see https://github.com/cloudevents/spec, distributed tracing.
_TRACE = ("traceparent", "tracestate")
_TRACE_VALUE = re.compile(r"[\x21-\x7e]{1,512}")


class Heading:
    """What the events of one message have in common on the wire.

    ``common`` are the attributes that are the same in all messages of a topic, ``more`` the others,
    but for the ``id``. ``of_topic`` is one object for each ``common``.
    """

    __slots__ = ("_form", "_tail", "common", "message", "more", "of_topic")

    def __init__(self, message: Message, common: Mapping[str, str], form: Form) -> None:
        self.message = message
        self.of_topic = message.topic
        self.common = common
        self.more = {"time": _time_text(message.at_us)}
        self._form = form
        self._tail = b'"txid":%d}' % message.txid
        if context := message.context:
            self._tail = b'"txid":%d,"context":%b}' % (message.txid, encode(dict(context)))
            for name in _TRACE:
                value = context.get(name)
                if isinstance(value, str) and _TRACE_VALUE.fullmatch(value):
                    self.more[name] = value

    def data(self, row: tuple[Any, ...]) -> tuple[bytes | None, bytes]:
        """Return the record's key and the data of a row's event."""
        return self._form.encode(row, self._tail)

    def key_only(self, row: tuple[Any, ...]) -> bytes:
        """Return the data without values and context."""
        message = self.message
        cut = form(message.topic, message.moved, message.truncated, True)
        return cut.encode(row, b'"txid":%d}' % message.txid)[1]


class Writer:
    """Makes CloudEvents of events. ``source`` is a URI reference that names their origin."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._latest: Heading | None = None
        self._common = functools.lru_cache(1_000)(self._common_of)

    def write(
        self, events: Iterable[Event]
    ) -> Iterator[tuple[Event, Heading, str, bytes | None, bytes]]:
        """Yield each event with its heading, its id, its record's key (see record_key) and data.

        The heading is the same object for events of one message that come together.
        """
        latest: Message | None = None
        for event in events:
            message = event._message
            if message is not latest:
                heading, latest = self._heading(message), message
            key, data = heading.data(event._row)
            yield event, heading, message.uid(event._number), key, data

    def attributes(self, event: Event) -> dict[str, str]:
        """Return the attributes, without the prefix that a protocol puts before their names."""
        heading = self._heading(event._message)
        return {**heading.common, **heading.more, "id": event.uid}

    def data(self, event: Event, *, key_only: bool = False) -> bytes:
        """Return the data; with ``key_only``, without values and context, marked as truncated."""
        heading, row = self._heading(event._message), event._row
        return heading.key_only(row) if key_only else heading.data(row)[1]

    def gap(self, gap: Gap) -> tuple[dict[str, str], bytes]:
        """Return the attributes and the data of a Gap, for the subscribers behind a broker."""
        until = _time_text(microseconds(gap.until))
        data = encode(
            {
                "since": _time_text(microseconds(gap.since)),
                "until": until,
                "reason": gap.reason,
                "detail": gap.detail,
            }
        )
        # The id is the same whenever the Gap is sent again, as that of an event is.
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._source} {data!r}")
        return {**self._constant(GAP_TYPE), "time": until, "id": identity.hex}, data

    def _heading(self, message: Message) -> Heading:
        latest = self._latest
        if latest is not None and latest.message is message:
            return latest
        topic = message.topic
        kind = form(topic, message.moved, message.truncated, False)
        latest = self._latest = Heading(message, self._common(topic), kind)
        return latest

    def _common_of(self, topic: Topic) -> dict[str, str]:
        subject = f"{topic.schema}.{topic.table}"
        return {**self._constant(TYPE_PREFIX + topic.op), "subject": subject}

    def _constant(self, kind: str) -> dict[str, str]:
        return {
            "specversion": SPEC_VERSION,
            "source": self._source,
            "type": kind,
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
        return encode(key[0])
    values = [convert(value)[0] for value in key]
    return encode(values[0] if len(values) == 1 else values)


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
    received.key = restore_all(found.key, types)
    received.values = restore_all(found.values, types)
    received.old = restore_all(found.old, old_types)
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


def _time_text(at_us: int) -> str:
    seconds, more = divmod(at_us, 1_000_000)
    return f"{_second_text(seconds)}.{more:06d}Z"


@functools.lru_cache(16)
def _second_text(seconds: int) -> str:
    return moment(seconds * 1_000_000).isoformat()[:19]


def _decode(data: bytes | None) -> Any:
    if not data:
        raise PayloadError("a CloudEvent without data")
    try:
        return msgspec.json.decode(data)
    except msgspec.MsgspecError:
        # msgspec refuses lone surrogates, which encode() passes on.
        return json.loads(data)
