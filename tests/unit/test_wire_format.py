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

from pgsignals import Gap
from pgsignals.cloudevents import Writer, from_cloudevent, to_cloudevent
from pgsignals.errors import PayloadError
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


@given(st.dictionaries(st.text(min_size=1), SCALARS | ARRAYS | DOCUMENTS, max_size=5))
def test_every_value_comes_back(values: dict[str, Any]) -> None:
    """Whatever the columns hold, the event on the other side is equal."""
    values.pop("id", None)
    for op in ("inserted", "updated", "deleted", "snapshot"):
        event = make_event(1, op, values=values)
        assert from_cloudevent(*to_cloudevent(event, "/test")) == event


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
