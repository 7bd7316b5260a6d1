"""How the messages of pgoutput are decoded, whatever somebody has done to them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import compress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg2.extensions import encodings

from pgsignals.core.errors import PayloadError
from pgsignals.wal.pgoutput import (
    UNCHANGED,
    Begin,
    Change,
    Commit,
    Delete,
    Insert,
    Message,
    Origin,
    Relation,
    RelationColumn,
    Row,
    Truncate,
    Type,
    Update,
    decode,
    picked,
    picked_rows,
    relation_of,
)
from tests.pgoutput_encoder import EPOCH, encode

TAGS = b"BCORYIUDTM"


def unsigned(bits: int) -> st.SearchStrategy[int]:
    """Numbers of so many bits, the greatest of them among the likely ones."""
    return st.integers(0, (1 << bits) - 1)


def signed(bits: int) -> st.SearchStrategy[int]:
    """Numbers of so many bits, one of them for the sign."""
    return st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)


oids, lsns = unsigned(32), unsigned(64)
times = signed(64).map(lambda since_2000: since_2000 + EPOCH)
# A database in SQL_ASCII sends any bytes.
names = st.binary(max_size=20).map(
    lambda name: name.replace(b"\0", b"").decode("utf-8", "surrogateescape")
)
schemas = names.map(lambda name: name or "pg_catalog")
values = st.binary(max_size=30) | st.none() | st.just(UNCHANGED)
rows: st.SearchStrategy[Row] = st.lists(values, max_size=6).map(tuple)
columns = st.builds(RelationColumn, names, oids, signed(32), st.booleans())

changes: st.SearchStrategy[Change] = st.one_of(
    st.builds(Begin, lsns, times, unsigned(32)),
    st.builds(Commit, lsns, lsns, times),
    st.builds(Origin, lsns, names),
    st.builds(
        Relation,
        *(oids, schemas, names, st.sampled_from("dnfi")),
        st.lists(columns, max_size=5).map(tuple),
    ),
    st.builds(Type, oids, schemas, names),
    st.builds(Insert, oids, rows),
    st.builds(Update, oids, st.none(), st.just(False), rows),
    st.builds(Update, oids, rows, st.booleans(), rows),
    st.builds(Delete, oids, rows, st.booleans()),
    st.builds(Truncate, st.lists(oids, max_size=5).map(tuple), st.booleans(), st.booleans()),
    st.builds(Message, st.booleans(), lsns, names, st.binary(max_size=50)),
)
messages = changes.map(encode)
row_changes = changes.filter(lambda change: isinstance(change, Insert | Update | Delete))
masks = st.lists(st.booleans(), max_size=6)


def exact(data: bytes) -> bool:
    """Whether bytes decode; if so, they are the one message that stands for what came out."""
    try:
        change = decode(data)
    except PayloadError:
        return False
    again = encode(change)
    # The server writes nothing for pg_catalog, but its name would be understood.
    assert again == data or getattr(change, "schema", None) == "pg_catalog"
    assert decode(again) == change
    return True


# --- what decodes ---------------------------------------------------------------------------------


@given(changes)
def test_round_trip(change: Change) -> None:
    """Every change comes out as it was written."""
    assert decode(encode(change)) == change


@pytest.mark.parametrize(
    ("data", "change"),
    [
        (
            "42 F000000001A2B3C8 FFFFFFFFFFFFFFFF FFFFFFFF",
            Begin(0xF000000001A2B3C8, 946_684_799_999_999, 0xFFFFFFFF),
        ),
        (
            "43 00 F000000001A2B3C8 F000000001A2B3F8 0000000000000000",
            Commit(0xF000000001A2B3C8, 0xF000000001A2B3F8, 946_684_800_000_000),
        ),
        ("4F F000000000000010 6F00", Origin(0xF000000000000010, "o")),
        (
            "52 00004001 00 7400 64 0002 01 696400 00000017 FFFFFFFF 00 6E00 00000413 0000000E",
            Relation(
                *(16385, "pg_catalog", "t", "d"),
                (RelationColumn("id", 23, -1, True), RelationColumn("n", 1043, 14, False)),
            ),
        ),
        ("59 FFFFFFFF 7300 6D6F6F6400", Type(0xFFFFFFFF, "s", "mood")),
        (
            "49 00004001 4E 0004 74 00000002 3432 6E 75 74 00000000",
            Insert(16385, (b"42", None, UNCHANGED, b"")),
        ),
        ("55 00004001 4E 0001 6E", Update(16385, None, False, (None,))),
        (
            "55 00004001 4B 0001 74 00000001 31 4E 0001 6E",
            Update(16385, (b"1",), True, (None,)),
        ),
        (
            "55 00004001 4F 0001 74 00000001 31 4E 0001 6E",
            Update(16385, (b"1",), False, (None,)),
        ),
        ("44 00004001 4B 0001 6E", Delete(16385, (None,), True)),
        ("44 00004001 4F 0001 6E", Delete(16385, (None,), False)),
        ("54 00000002 01 00004001 00004002", Truncate((16385, 16386), True, False)),
        ("54 00000001 02 00004001", Truncate((16385,), False, True)),
        ("4D 01 0000000000000010 7000 00000002 00FF", Message(True, 16, "p", b"\0\xff")),
        ("4D 00 F000000000000010 00 00000000", Message(False, 0xF000000000000010, "", b"")),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_documented_format(data: str, change: Change) -> None:
    """Messages that were written by hand, from the documentation, decode to what they say."""
    assert decode(bytes.fromhex(data)) == change
    assert encode(change) == bytes.fromhex(data)


def test_encoding() -> None:
    """Names are decoded by the caller's codec, and what is not text in it is escaped."""
    data = encode(Origin(1, "Größe"), "latin-1")
    assert decode(data, "latin-1") == Origin(1, "Größe")
    assert decode(data) == Origin(1, "Gr\udcf6\udcdfe")


# --- what does not --------------------------------------------------------------------------------


@given(
    st.binary()
    | st.builds(lambda tag, rest: bytes([tag]) + rest, st.sampled_from(TAGS), st.binary())
)
@example(b"")
def test_any_bytes(data: bytes) -> None:
    """Whatever bytes come, they are exactly one message or a PayloadError."""
    exact(data)


@given(messages, st.data())
def test_a_cut_message(message: bytes, data: st.DataObject) -> None:
    """No message decodes that lacks its end."""
    assert not exact(message[: data.draw(st.integers(0, len(message) - 1))])


@given(messages, st.binary(min_size=1))
def test_a_message_with_more_behind_it(message: bytes, more: bytes) -> None:
    """No message decodes that something follows."""
    assert not exact(message + more)


@given(messages, st.data(), st.integers(1, 255))
def test_a_changed_byte(message: bytes, data: st.DataObject, change: int) -> None:
    """One wrong byte makes another message or a PayloadError."""
    at = data.draw(st.integers(0, len(message) - 1))
    exact(message[:at] + bytes([message[at] ^ change]) + message[at + 1 :])


@given(messages, st.data(), st.binary(max_size=8))
def test_a_replaced_part(message: bytes, data: st.DataObject, part: bytes) -> None:
    """A part that is lost or replaced makes another message or a PayloadError."""
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(message))] * 2)))
    exact(message[:start] + part + message[end:])


@given(st.sampled_from(sorted(set(encodings.values()))), st.binary(), st.sampled_from(b"ORYM"))
def test_any_bytes_in_any_encoding(encoding: str, data: bytes, tag: int) -> None:
    """Whatever a name's bytes are, no encoding of PostgreSQL's fails in its own way."""
    message = bytes([tag]) + bytes(9 if tag in b"OM" else 4) + data
    for whole in (message, message + b"\0", message + bytes(4)):
        try:
            decode(whole, encoding)
        except PayloadError:
            continue


def test_an_unknown_encoding_is_the_callers_error() -> None:
    """A codec that Python does not have is no fault of the message."""
    with pytest.raises(LookupError, match="no-such-codec"):
        decode(encode(Origin(1, "o")), "no-such-codec")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "0 bytes are cut short"),
        ("53 00000001 01", "begins with b'S'"),  # the start of a streamed transaction
        ("62 00", "begins with b'b'"),  # of a prepared one
        ("43 01 0000000001A2B3C8 0000000001A2B3F8 0000000000000000", "flags 0x1"),
        ("4D 02 0000000000000010 7000 00000000", "flags 0x2"),
        ("54 00000001 04 00004001", "flags 0x4"),
        ("52 00004001 00 7400 64 0001 02 696400 00000017 FFFFFFFF", "flags 0x2"),
        ("52 00004001 00 7400 78 0000", "0x78 where one of b'dnfi'"),
        ("49 00004001 4B 0001 6E", "0x4b where one of b'N'"),
        ("55 00004001 4F 0001 6E 4F 0001 6E", "0x4f where one of b'N'"),
        ("44 00004001 4E 0001 6E", "0x4e where one of b'KO'"),
        ("49 00004001 4E 0001 62 00000001 31", "binary format"),
        ("49 00004001 4E 0001 78", "a value of the kind 0x78"),
        ("49 00004001 4E 0001 74 FFFFFFFF 31", "14 bytes for a message of 4294967308"),
        ("49 00004001 4E 0002 74 00000009 31 6E", "cut short"),
        ("49 00004001 4E FFFF", "cut short"),
        ("49 00004001 4E 0000 00", "9 bytes for a message of 8"),
        ("4D 01 0000000000000010 7000 FFFFFFFF 00", "17 bytes for a message of 4294967311"),
        ("4F 0000000000000010 6F", "cut short"),
    ],
)
def test_a_refusal_says_why(data: str, says: str) -> None:
    """The error says what is wrong, and nothing of the values."""
    with pytest.raises(PayloadError) as caught:
        decode(bytes.fromhex(data))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "lie",
    [
        lambda huge: b"I" + bytes(4) + b"N\0\1t" + huge,
        lambda huge: b"I" + bytes(4) + b"N" + huge,
        lambda huge: b"U" + bytes(4) + b"O\0\1t" + huge,
        lambda huge: b"D" + bytes(4) + b"K" + huge,
        lambda huge: b"T" + huge + b"\0",
        lambda huge: b"M\0" + bytes(8) + b"p\0" + huge,
        lambda huge: b"R" + bytes(6) + b"d" + huge,
    ],
)
def test_a_number_that_lies_costs_nothing(lie: Callable[[bytes], bytes]) -> None:
    """However much a message claims to hold, no memory is taken for what is not there."""
    for huge in (b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\x80" + bytes(3)):
        tracemalloc.start()
        try:
            with pytest.raises(PayloadError):
                decode(lie(huge))
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


# --- rows of which a part is wanted ---------------------------------------------------------------


@given(row_changes, masks)
def test_what_is_picked(change: Insert | Update | Delete, wanted: list[bool]) -> None:
    """Of each row there are the wanted values alone; a row that is too short is refused."""
    data = encode(change)
    pair = (getattr(change, "old", None), getattr(change, "new", None))
    assert relation_of(data) == change.relation
    [*_, last] = [row for row in pair if row is not None]
    if len(last) < len(wanted):
        with pytest.raises(PayloadError):
            picked(data, wanted)
        return
    expected = tuple(None if row is None else [*compress(row, wanted)] for row in pair)
    if expected[0] is not None and getattr(change, "keys_only", False):
        # What belongs to a replica identity is never NULL.
        expected = ([UNCHANGED if v is None else v for v in expected[0]], expected[1])
    assert picked(data, wanted) == expected
    [*single] = [row for row in expected if row is not None]
    whole = len(single) == 1 and UNCHANGED not in single[0]
    if not isinstance(change, Insert) or whole:
        assert picked_rows([data, data], wanted) == (2 * single if whole else None)


@given(row_changes.map(encode), st.lists(st.just(True), min_size=1, max_size=6), st.data())
def test_a_row_that_is_cut_short_is_not_picked(
    data: bytes, wanted: list[bool], draw: st.DataObject
) -> None:
    """Values come out whole, or PayloadError is raised, wherever the message ends."""
    cut = data[: draw.draw(st.integers(0, len(data)))]
    try:
        found = picked(cut, wanted)
    except PayloadError:
        return
    # What follows the values that are wanted is not looked at.
    assert found == picked(data, wanted)
