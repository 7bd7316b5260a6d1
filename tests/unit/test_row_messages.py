"""Rows of the write-ahead log, turned into messages and into payloads that are kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgsignals.core.events import Message, Topic
from pgsignals.core.payload import Broken, Field, Layout
from pgsignals.core.rows import UNCHANGED, RowsDecoder, Value, Values

INT, TEXT, NUMERIC, BOOL = 23, 25, 1700, 16
FIELDS = {
    "id": Field(INT, "int4"),
    "note": Field(TEXT, "text"),
    "price": Field(NUMERIC, "numeric"),
    "open": Field(BOOL, "bool"),
}
COLUMNS = ("open", "price", "id", "note")


def cast(oid: int, text: str) -> Any:
    """As psycopg2 does, but for one type, and only for what it knows."""
    assert oid == NUMERIC
    return float(text)


@dataclass
class Listed:
    """Changes that are given as values: see Changes."""

    data: list[tuple[Values, Values]]
    columns: tuple[str, ...] = COLUMNS
    txid: int = 7
    at_us: int = 1_000_000
    id: int = 99
    first: int = 5
    context: str = ""
    foreign: bool = False
    asked: list[Sequence[bool]] = field(default_factory=list)

    def rows(self, wanted: Sequence[bool]) -> Iterator[tuple[Values, Values]]:
        self.asked.append(wanted)
        for old, new in self.data:
            yield old and [*compress(old, wanted)], new and [*compress(new, wanted)]

    def single_rows(
        self, data: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Sequence[Value]] | None:
        found: list[Sequence[Value]] = []
        for pair in Listed([*data], asked=self.asked).rows(wanted):
            [*rows] = [each for each in pair if each is not None]
            if len(rows) != 1 or UNCHANGED in rows[0]:
                return None
            found += rows
        return found


def decoder(
    op: str,
    values: tuple[str, ...] = ("note", "price", "open"),
    differing: tuple[int, ...] = (),
    only: tuple[str, tuple[str, ...]] | None = None,
    *,
    replicated: bool = False,
    compared: bool = True,
) -> RowsDecoder:
    layout = Layout(
        "default",
        "public",
        "t",
        op,
        None,
        "abcd",
        ("id",),
        (FIELDS["id"],),
        values,
        tuple(FIELDS[each] for each in values),
        op == "updated" and bool(values) and compared,
        rows=True,
        columns=("id", *values),
        differing=differing,
        only=only,
        replicated=replicated,
    )
    topic = Topic(
        "t", op, None, "public", "t", ("id",), values, layout.compared, lambda *a, **k: [], "abcd"
    )
    found = RowsDecoder(topic, layout, cast)
    found.read_in("utf-8")
    return found


def row(key: int | None, note: str | None, price: float | None, is_open: bool | None) -> list[Any]:
    """A row as the log has it."""

    def text(value: object) -> bytes | None:
        return None if value is None else str(value).encode("utf-8", "replace")

    return [
        None if is_open is None else b"t" if is_open else b"f",
        text(price),
        text(key),
        None if note is None else note.encode(),
    ]


ROWS = st.tuples(
    st.integers(-(2**31), 2**31 - 1),
    st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    st.none() | st.floats(allow_nan=False),
    st.none() | st.booleans(),
)


@given(st.sampled_from(["inserted", "updated", "deleted"]), st.lists(ROWS), st.data())
def test_a_kept_payload_is_the_event_again(op: str, given_rows: list[Any], data: Any) -> None:
    """Each row's payload decodes to the same values, uid, time and context."""
    pairs: list[tuple[Values, Values]] = []
    for new in given_rows:
        old = data.draw(ROWS)
        pairs.append(
            {
                "inserted": (None, row(*new)),
                "deleted": (row(*new), None),
                "updated": (row(*old), row(*new)),
            }[op]
        )
    own = decoder(op)
    changes = Listed(pairs, context='{"who":"é"}')
    messages = own.messages(changes, {"who": "é"})
    rows = 0
    for message in messages:
        assert isinstance(message, Message)
        for number, each in enumerate(message.rows):
            payload = message.row_payload(number)
            assert payload is not None
            again = own.decode(payload)
            assert isinstance(again, Message)
            assert [*again.rows] == [each]
            assert again.uid(0) == message.uid(number)
            kept = (again.txid, again.at_us, again.context, again.moved)
            assert kept == (message.txid, message.at_us, message.context, message.moved)
            rows += 1
    assert rows == len(pairs)


@given(st.sampled_from(["inserted", "deleted"]), st.lists(st.lists(ROWS, max_size=3), min_size=1))
def test_transactions_are_read_together(op: str, given_rows: list[list[Any]]) -> None:
    """Each has the message that it has alone, with its own number, time and rows."""
    own = decoder(op)
    runs = [
        Listed(
            [(None, row(*each)) if op == "inserted" else (row(*each), None) for each in rows],
            txid=number,
            id=100 + number,
            at_us=number,
            first=2 * number,
        )
        for number, rows in enumerate(given_rows)
        if rows
    ]
    singly = [own.messages(run, {"who": "é"}) for run in runs]
    if runs:
        together = own.together(runs, {"who": "é"})
        assert together is not None
        assert [[each] for each in map(_said, together)] == [
            [_said(each) for each in found] for found in singly
        ]


def _said(message: Any) -> tuple[Any, ...]:
    rows = [*message.rows]
    kept = [message.row_payload(number) for number in range(len(rows))]
    return (rows, message.uid(0), message.at_us, message.context, message.position, kept)


def test_what_cannot_be_read_together() -> None:
    """One value of another type has all the transactions taken one by one."""
    runs = [Listed([(None, row(1, "a", 1.5, True))]), Listed([(None, [b"t", b"1", b"one", b"a"])])]
    assert decoder("inserted").together(runs, {}) is None


def test_only_what_is_wanted_is_read() -> None:
    """Neither other columns, nor those behind the last one."""
    changes = Listed([(None, row(1, "a", 1.5, True))])
    [message] = decoder("inserted", ()).messages(changes, {})
    assert isinstance(message, Message)
    assert ([*message.rows], changes.asked) == ([(1,)], [(False, False, True)])


def test_rows_are_counted_in_their_transaction() -> None:
    """Rows that do not concern the watcher leave gaps in the numbers, which name the events."""
    pairs: list[tuple[Values, Values]] = [
        (row(1, "a", None, None), row(1, "a", None, None)),
        (row(2, "a", None, None), row(2, "b", None, None)),
        (row(3, "a", None, None), row(4, "b", None, None)),
    ]
    messages = decoder("updated", ("note",), (0,)).messages(Listed(pairs), {})
    found = [m for m in messages if isinstance(m, Message)]
    assert [(m.first, [*m.rows], m.moved) for m in found] == [
        (6, [(2, "b", "a", "1")], False),
        (7, [(4, 3, "b", "a", "1")], True),
    ]
    assert [m.uid(0) for m in found] == ["abcd-7-63-6", "abcd-7-63-7"]


@pytest.mark.parametrize(
    ("op", "old", "new", "columns", "says"),
    [
        ("updated", None, row(1, "a", None, None), COLUMNS, "REPLICA IDENTITY"),
        ("deleted", [None, None, b"1", UNCHANGED], None, COLUMNS, "REPLICA IDENTITY"),
        ("inserted", None, [b"1"], ("id",), "no column 'note'"),
        ("inserted", None, [None, None, b"1.5", b"a"], COLUMNS, "has been changed"),
        ("inserted", None, [None, None, UNCHANGED, b"a"], COLUMNS, "REPLICA IDENTITY"),
        ("updated", row(1, "a", None, None), [None, None, b"one", b"b"], COLUMNS, "been changed"),
    ],
)
def test_what_the_log_lacks(op: str, old: Any, new: Any, columns: Any, says: str) -> None:
    """A value that did not come is never NULL: the watcher is broken, and says why."""
    [found] = decoder(op, ("note",)).messages(Listed([(old, new)], columns), {})
    assert isinstance(found, Broken)
    assert says in found.error


def test_a_column_of_another_type() -> None:
    """Rows from before and after the change are told apart: those that fit are events."""
    pairs: list[tuple[Values, Values]] = [
        (None, [b"t", b"1", b"1", b"a"]),
        (None, [b"maybe", b"1", b"2", b"b"]),
        (None, [b"f", b"1", b"3", b"c"]),
    ]
    first, second, problem = decoder("inserted").messages(Listed(pairs), {})
    assert isinstance(first, Message)
    assert isinstance(second, Message)
    assert isinstance(problem, Broken)
    assert [(each.first, each.rows[0][0]) for each in (first, second)] == [(5, 1), (7, 3)]


def test_a_key_that_moves_beside_values_that_did_not_come() -> None:
    """Of the old row the key alone is wanted, and nothing else of it is."""
    pairs: list[tuple[Values, Values]] = [
        ([UNCHANGED, UNCHANGED, b"1", UNCHANGED], row(2, "a", 1.5, True))
    ]
    own = decoder("updated", ("note",), compared=False)
    [message] = own.messages(Listed(pairs), {})
    assert isinstance(message, Message)
    assert ([*message.rows], message.moved) == ([(2, 1, "a")], True)
    payload = message.row_payload(0)
    assert payload is not None
    again = own.decode(payload)
    assert isinstance(again, Message)
    assert [*again.rows] == [(2, 1, "a")]


def test_rows_of_another_server() -> None:
    """What a subscription writes is for those alone who asked for it."""
    changes = Listed([(None, row(1, "a", 1.5, True))], foreign=True)
    assert decoder("inserted").messages(changes, {}) == []
    assert len(decoder("inserted", replicated=True).messages(changes, {})) == 1


def test_models_that_share_a_table() -> None:
    """Rows of other models are left out; one that moves between them is an update of both."""
    own = decoder("updated", ("note",), only=("note", ("a",)))
    pairs: list[tuple[Values, Values]] = [
        (row(1, "b", None, None), row(1, "b", None, None)),
        (row(2, "a", None, None), row(2, "b", None, None)),
        (row(3, "b", None, None), row(3, "a", None, None)),
    ]
    messages = own.messages(Listed(pairs), {})
    assert [each[0] for m in messages if isinstance(m, Message) for each in m.rows] == [2, 3]
