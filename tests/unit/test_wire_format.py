"""The wire format: what is written is read back equal, by us and by the official SDK."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.json import JSONFormat
from hypothesis import given
from hypothesis import strategies as st

from pgsignals import Event, Gap
from pgsignals.cloudevents import Writer, from_cloudevent, record_key, to_cloudevent
from pgsignals.core.events import Message, Topic
from pgsignals.errors import PayloadError
from pgsignals.plugins.portable import convert
from pgsignals.testing.conformance import make_event

SCALARS: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(),
    st.floats(allow_nan=False),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.dates(),
    st.datetimes(),
    st.datetimes(timezones=st.just(timezone.utc)),
    st.times(),
    st.timedeltas(),
    st.binary().map(memoryview),
)
ARRAYS: Any = st.one_of(
    st.lists(st.lists(st.decimals(allow_nan=False) | st.none())),
    st.lists(st.uuids() | st.none()),
    st.lists(st.floats(allow_nan=False) | st.none()),
    st.lists(st.dates()),
)
DOCUMENTS: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


NAMES: Any = st.lists(st.text(min_size=1), max_size=4, unique=True)


@st.composite
def events(draw: Any) -> list[Event]:
    """Events of one message, of any topic and with any values."""
    op = draw(st.sampled_from(["inserted", "updated", "deleted", "truncated", "snapshot"]))
    key, values = tuple(draw(NAMES)), tuple(draw(NAMES))
    compared = op == "updated" and draw(st.booleans())
    topic = Topic(
        model="model",
        op=op,
        label=draw(st.none() | st.text()),
        schema=draw(st.text(min_size=1)),
        table=draw(st.text(min_size=1)),
        key=key,
        values=values,
        compared=compared,
        loader=lambda session, ids, /, **options: [],
        name="name",
    )
    moved, truncated = op == "updated" and draw(st.booleans()), draw(st.booleans())
    some: Any = SCALARS | ARRAYS | DOCUMENTS
    parts = [some] * len(key) * (2 if moved else 1)
    if not truncated:
        parts += [some] * len(values) * (2 if compared else 1)
        if compared:
            parts.append(st.text("01", min_size=len(values), max_size=len(values)))
    if op == "truncated":
        parts = []
    rows = draw(st.lists(st.tuples(*parts), min_size=1, max_size=3))
    context = draw(st.dictionaries(st.text(), st.integers() | st.text(), max_size=2))
    message = Message(topic, draw(st.integers(0, 2**63)), 1, 0, context, rows, moved, truncated)
    return [Event(message, number, row) for number, row in enumerate(rows)]


def portable(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values as JSON has them, and the types of those for which it has none."""
    found = {name: convert(value) for name, value in values.items()}
    tags = {name: tag for name, (_, tag) in found.items() if tag is not None}
    return {name: value for name, (value, _) in found.items()}, tags


def as_documented(event: Event, key_only: bool) -> dict[str, Any]:
    """The data of an event, put together field by field as docs/wire-format.md has it."""
    truncated = key_only or event.truncated
    old = event.old if event.op == "updated" else {}
    key, types = portable(event.key)
    found: dict[str, Any] = {
        "op": event.op,
        "schema": event.schema,
        "table": event.table,
        "key": key,
    }
    if event.label is not None:
        found["label"] = event.label
    if truncated:
        old = {name: value for name, value in old.items() if name in key}
        found["truncated"] = True
    else:
        found["values"], of_values = portable(event.values)
        types |= of_values
    if old:
        found["old"], of_old = portable(old)
        if of_old != {name: tag for name, tag in types.items() if name in old}:
            found["old_types"] = of_old
    if event.op == "updated":
        found["changed"] = sorted(n for n in event.changed if not truncated or n in key)
    if types:
        found["types"] = types
    found["txid"] = event.txid
    if event.context and not key_only:
        found["context"] = event.context
    return found


@given(events())
def test_the_data_are_as_documented(events: list[Event]) -> None:
    """Whatever the topic and the values, the templates give the documented fields, in order."""
    writer = Writer("/test")
    for found, heading, uid, key, data in writer.write(events):
        expected = as_documented(found, key_only=False)
        assert json.loads(data) == json.loads(json.dumps(expected))
        assert list(json.loads(data)) == list(expected)
        assert uid == found.uid
        assert {**heading.common, **heading.more, "id": uid} == writer.attributes(found)
        assert key == record_key(found)
        short = json.loads(writer.data(found, key_only=True))
        assert short == json.loads(json.dumps(as_documented(found, key_only=True)))


@given(st.dictionaries(st.text(min_size=1), SCALARS | ARRAYS | DOCUMENTS, max_size=5))
def test_every_value_comes_back(values: dict[str, Any]) -> None:
    """Whatever the columns hold, the event on the other side is equal."""
    values.pop("id", None)
    for op in ("inserted", "updated", "deleted", "snapshot"):
        event = make_event(1, op, values=values)
        assert from_cloudevent(*to_cloudevent(event, "/test")) == event


@given(st.datetimes(timezones=st.sampled_from([None, timezone.utc])))
def test_a_time_is_as_python_writes_it(at: datetime) -> None:
    """The text has an offset in digits, which Python 3.10 reads, and no needless fraction."""
    assert convert(at)[0] == at.isoformat()


def test_fields_of_a_later_version_are_ignored() -> None:
    """A reader takes what it knows."""
    attributes, data = to_cloudevent(make_event(1), "/test")
    later = json.loads(data) | {"colour": "red"}
    assert from_cloudevent({**attributes, "shade": "dark"}, json.dumps(later).encode()) == (
        make_event(1)
    )


@pytest.mark.parametrize("name", ["id", "specversion", "time", "type"])
def test_an_attribute_that_is_missing(name: str) -> None:
    """What lacks an attribute that every event of ours has is refused, and says which."""
    attributes, data = to_cloudevent(make_event(1), "/test")
    with pytest.raises(PayloadError, match=f"without the attribute '{name}'"):
        from_cloudevent({key: attributes[key] for key in attributes if key != name}, data)


def test_a_gap_that_is_sent_again_is_the_same() -> None:
    """Its id tells it from others, and is the same when a broker has to be told again."""
    writer, since = Writer("/test"), datetime(2026, 1, 1, tzinfo=timezone.utc)
    gaps = [Gap(since, since, reason) for reason in ("overflow", "overflow", "retention")]
    one, again, other = (writer.gap(gap)[0]["id"] for gap in gaps)
    assert one == again != other


def test_the_sdk_reads_it() -> None:
    """The official SDK finds the attributes and the data in a Kafka record."""
    attributes, data = to_cloudevent(make_event(1), "/test")
    headers = {
        "content-type" if name == "datacontenttype" else f"ce_{name}": text.encode()
        for name, text in attributes.items()
    }
    found = from_binary(KafkaMessage(headers=headers, key=None, value=data), JSONFormat())
    assert found.get_id() == attributes["id"]
    assert found.get_type() == "pgsignals.updated"
    assert found.get_data() == json.loads(data)
