"""Payloads are untrusted: what is well formed comes back as it was, all else is a PayloadError."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgsignals.core.events import Message, Topic
from pgsignals.core.payload import MAX_FRAGMENTS, SILENT, VERSION, Broken, Decoder, Field
from pgsignals.errors import PayloadError

INT = Field(23, "int4")
TEXT = Field(25, "text")
BOOL = Field(16, "bool")
DATE = Field(1082, "date")

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
INTEGERS = st.integers(-(2**63), 2**63 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=10,
)


def cast(oid: int, text: str) -> Any:
    """Stands for psycopg2's typecasters: one type, some of whose values it cannot make."""
    assert oid == DATE.oid
    if not text.isdigit():
        raise ValueError(text)
    return int(text)


def decoder(
    *,
    key: tuple[Field, ...] = (INT,),
    values: tuple[Field, ...] = (),
    op: str = "updated",
    compared: bool = False,
) -> Decoder:
    topic = Topic(
        model="t",
        op=op,
        label=None,
        schema="public",
        table="t",
        key=tuple(f"k{n}" for n in range(len(key))),
        values=tuple(f"v{n}" for n in range(len(values))),
        compared=compared,
        loader=lambda session, ids: [],
    )
    return Decoder(topic, key, values, cast)


SHAPES = {
    "bare": decoder(),
    "boolean": decoder(key=(BOOL,)),
    "no key": decoder(key=(), values=(TEXT,)),
    "empty": decoder(key=()),
    "text": decoder(key=(TEXT,)),
    "values": decoder(key=(INT, TEXT), values=(TEXT, BOOL, DATE)),
    "compared": decoder(key=(DATE,), values=(TEXT, INT), compared=True),
}


def header(**fields: Any) -> str:
    return json.dumps({"v": VERSION, "x": 7, "s": 1, "t": 1_700_000_000_000_000, **fields})


def line(key: list[Any], values: list[Any]) -> str:
    """A row as the trigger writes it: a tab stands where the values begin."""
    texts = [",".join(json.dumps(v, ensure_ascii=False) for v in part) for part in (key, values)]
    return f"[{texts[0]}\t{',' if key and values else ''}{texts[1]}]"


@pytest.mark.parametrize("shape", SHAPES)
@given(payload=st.text().filter(lambda text: text != SILENT))
def test_any_text(shape: str, payload: str) -> None:
    """Arbitrary text, but for what a trigger says that can say nothing, raises nothing else."""
    with pytest.raises(PayloadError):
        SHAPES[shape].decode(payload)


@pytest.mark.parametrize("shape", SHAPES)
@given(
    fields=st.dictionaries(st.sampled_from([*"vxstc", "moved", "cut", "part", "error"]), JSON),
    body=st.text() | JSON.map(json.dumps) | st.lists(JSON.map(json.dumps)).map("\n".join),
)
def test_any_header_and_body(shape: str, fields: dict[str, Any], body: str) -> None:
    """A header of the right shape with any values, before any JSON, is decoded or refused."""
    _decode(SHAPES[shape], f"{header(**fields)}\n{body}")


@pytest.mark.parametrize("shape", SHAPES)
@given(data=st.data())
def test_mutations_of_a_valid_payload(shape: str, data: st.DataObject) -> None:
    """Whatever is cut out, put in or changed, it is decoded or refused."""
    bodies = {
        "bare": "1\n2",
        "boolean": "true\nfalse",
        "no key": '[\t"a"]',
        "empty": "[\t]",
        "text": '["a"]\n["b"]',
        "values": '[1,"a"\t,"b",true,"3"]',
        "compared": '["1"\t,"a",1,"b",2,"11"]',
    }
    payload = header(c='{"a":1}') + "\n" + bodies[shape]
    assert isinstance(SHAPES[shape].decode(payload), Message)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        end = data.draw(st.integers(at, min(len(payload), at + 5)))
        payload = payload[:at] + data.draw(st.text(max_size=5)) + payload[end:]
    _decode(SHAPES[shape], payload)


def _decode(using: Decoder, payload: str) -> Message | Broken | None:
    """Decode, and see that what comes out can be used."""
    try:
        found = using.decode(payload)
    except PayloadError:
        return None
    if isinstance(found, Message):
        assert found.at.year >= 1970
        assert isinstance(found.context, dict)
        width = len(using.topic.key)
        for row in found.rows:
            assert len(row) >= width
    return found


@given(keys=st.lists(INTEGERS, min_size=1))
def test_bare_keys_round_trip(keys: list[int]) -> None:
    """A single number as key comes as a line of its own."""
    message = decoder().decode(header() + "\n" + "\n".join(map(str, keys)))
    assert isinstance(message, Message)
    assert message.rows == [(key,) for key in keys]
    assert (message.txid, message.sequence, message.at_us) == (7, 1, 1_700_000_000_000_000)


@given(keys=st.lists(st.booleans(), min_size=1))
def test_bare_booleans_round_trip(keys: list[bool]) -> None:
    """So does a single boolean."""
    message = SHAPES["boolean"].decode(header() + "\n" + "\n".join(map(json.dumps, keys)))
    assert isinstance(message, Message)
    assert message.rows == [(key,) for key in keys]


@given(
    rows=st.lists(
        st.tuples(
            INTEGERS,
            TEXTS,
            TEXTS | st.none(),
            st.booleans() | st.none(),
            st.integers(0, 10**30) | st.none(),
        ),
        min_size=1,
    )
)
def test_values_round_trip(rows: list[tuple[Any, ...]]) -> None:
    """Keys and values of all kinds come back, NULL as None, and the rest through the cast."""
    lines = [line([k, t], [v, b, None if d is None else str(d)]) for k, t, v, b, d in rows]
    message = SHAPES["values"].decode(header() + "\n" + "\n".join(lines))
    assert isinstance(message, Message)
    assert message.rows == rows


@given(new=TEXTS, old=TEXTS, flags=st.text("01", min_size=2, max_size=2))
def test_compared_rows_round_trip(new: str, old: str, flags: str) -> None:
    """New values, old values and what differs."""
    message = SHAPES["compared"].decode(header() + "\n" + line(["5"], [new, 1, old, None, flags]))
    assert isinstance(message, Message)
    assert message.rows == [(5, new, 1, old, None, flags)]


@given(new=INTEGERS, old=INTEGERS, text=TEXTS)
def test_moved_rows_round_trip(new: int, old: int, text: str) -> None:
    """A changed key comes twice, before the values; cut rows have nothing else."""
    moving = decoder(values=(TEXT,), compared=True)
    message = moving.decode(header(moved=True) + "\n" + line([new, old], [text, text, "0"]))
    assert isinstance(message, Message)
    assert (message.moved, message.rows) == (True, [(new, old, text, text, "0")])
    assert message.values_start == 2
    message = moving.decode(header(moved=True, cut=True) + f"\n[{new},{old}]")
    assert isinstance(message, Message)
    assert (message.truncated, message.rows) == (True, [(new, old)])


@pytest.mark.parametrize("flags", ["", "0", "000", "0x", "\uff101", "01\n"])
def test_flags_are_checked(flags: str) -> None:
    """As many zeros and ones as there are values."""
    with pytest.raises(PayloadError):
        SHAPES["compared"].decode(header() + "\n" + line(["5"], ["a", 1, "b", 2, flags]))


@given(key=TEXTS, size=st.integers(1, 50))
def test_fragments_round_trip(key: str, size: int) -> None:
    """A key in pieces is put together, however it was divided."""
    using = decoder(key=(TEXT,), values=(INT,))
    pieces = _pieces(key, size)
    for number, piece in enumerate(pieces[:-1], 1):
        assert using.decode(_fragment(number, len(pieces), piece)) is None
    message = using.decode(_fragment(len(pieces), len(pieces), pieces[-1]))
    assert isinstance(message, Message)
    assert (message.truncated, message.rows) == (True, [(key,)])


def _pieces(key: str, size: int) -> list[str]:
    text = base64.b64encode(json.dumps([key]).encode()).decode()
    return [text[at : at + size] for at in range(0, len(text), size)]


def _fragment(number: int, count: int, piece: str) -> str:
    return header(cut=True, part=[number, count]) + "\n" + piece


@given(order=st.lists(st.integers(1, 4), max_size=12))
def test_fragments_out_of_turn(order: list[int]) -> None:
    """Only all the fragments in their order make a message, and what went before spoils nothing."""
    using = decoder(key=(TEXT,))
    pieces = _pieces("a" * 12, 7)
    assert len(pieces) == 4
    reached = 0
    for number in order:
        reached = number if number in (1, reached + 1) else 0
        if reached:
            found = using.decode(_fragment(number, 4, pieces[number - 1]))
            assert isinstance(found, Message) == (number == 4)
        else:
            with pytest.raises(PayloadError):
                using.decode(_fragment(number, 4, pieces[number - 1]))
        reached %= 4
    for number in (1, 2, 3):
        assert using.decode(_fragment(number, 4, pieces[number - 1])) is None
    assert isinstance(using.decode(_fragment(4, 4, pieces[3])), Message)


@pytest.mark.parametrize(
    "part", [[0, 0], [0, 1], [2, 1], [1, MAX_FRAGMENTS + 1], [-1, 3], [1, 10**30], [1], [1, 2, 3]]
)
def test_impossible_fragments(part: list[int]) -> None:
    """Numbers that no trigger writes are refused before anything is kept."""
    with pytest.raises(PayloadError):
        decoder(key=(TEXT,)).decode(header(cut=True, part=part) + "\nMQ==")


@pytest.mark.parametrize(
    "piece", ["", "!", "MQ", "/w==", "W10=", base64.b64encode(b"[1]").decode()]
)
def test_fragments_of_something_else(piece: str) -> None:
    """What is no base64, no UTF-8 or no row of the table is refused."""
    with pytest.raises(PayloadError):
        decoder(key=(TEXT,)).decode(header(cut=True, part=[1, 1]) + "\n" + piece)


@pytest.mark.parametrize("count", [1, 100, 2_000, 100_000])
@pytest.mark.parametrize("bracket", ["[", '{"a":', '[{"a":'])
def test_deep_nesting(bracket: str, count: int) -> None:
    """Brackets in any number, in the header, the body and the context, do no harm."""
    for shape in SHAPES.values():
        with pytest.raises(PayloadError):
            shape.decode(bracket * count)
        with pytest.raises(PayloadError):
            shape.decode(header() + "\n" + bracket * count)
        with pytest.raises(PayloadError):
            shape.decode(header(extra=0)[:-2] + bracket * count)
    message = decoder().decode(header(c=bracket * count) + "\n1")
    assert isinstance(message, Message)
    assert message.context == {}


@pytest.mark.parametrize("name", ["v", "x", "s", "t"])
@pytest.mark.parametrize(
    "number", ["-1", "1e400", "1" * 5000, "1.5", "9" * 20, '"1"', "null", "NaN"]
)
def test_impossible_numbers(name: str, number: str) -> None:
    """Numbers out of range are refused here, not where a receiver asks for the time."""
    fields = {"v": "1", "x": "1", "s": "1", "t": "1", name: number}
    payload = "{" + ",".join(f'"{n}":{v}' for n, v in fields.items()) + "}\n1"
    with pytest.raises(PayloadError):
        decoder().decode(payload)


@given(version=st.integers().filter(lambda n: n != VERSION))
def test_other_versions(version: int) -> None:
    """A payload of a version that is not known is refused, not guessed at."""
    with pytest.raises(PayloadError):
        decoder().decode(header(v=version) + "\n1")


@given(error=TEXTS)
def test_broken_watchers(error: str) -> None:
    """A trigger's word that it is broken is not taken for a change."""
    found = decoder().decode(header(error=error))
    assert found == Broken(1_700_000_000_000_000, error)


@pytest.mark.parametrize("at_us", [-1, 10**18, 2**70])
def test_broken_watchers_of_impossible_times(at_us: int) -> None:
    """The time of a broken watcher's word is checked like any other."""
    with pytest.raises(PayloadError):
        decoder().decode(header(error="x", t=at_us))


def test_value_that_python_cannot_hold() -> None:
    """A value that has no Python object stays text; a key that has none is not from a trigger."""
    message = SHAPES["values"].decode(header() + "\n" + line([1, "a"], ["b", True, "44 BC"]))
    assert isinstance(message, Message)
    assert message.rows == [(1, "a", "b", True, "44 BC")]


@given(context=JSON)
def test_context_round_trip(context: Any) -> None:
    """An object is the context; anything else that somebody set is no context."""
    text = json.dumps(context)
    message = decoder().decode(header(c=text) + "\n1")
    assert isinstance(message, Message)
    finite = "NaN" not in text and "Infinity" not in text
    if not isinstance(context, dict):
        assert message.context == {}
    elif finite and _small(context):
        assert message.context == context


def _small(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_small, value.values()))
    if isinstance(value, list):
        return all(map(_small, value))
    return not isinstance(value, int) or abs(value) < 2**63
