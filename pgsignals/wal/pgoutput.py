"""Decodes the messages of pgoutput, PostgreSQL's output plugin; they are untrusted until here.

The format is described in PostgreSQL's documentation, "Logical Replication Message Formats". This
is version 1 of the protocol, as PostgreSQL 14 to 18 write it, with values as text: no transactions
in progress, no two-phase commits.

The server converts names and values to the ``client_encoding`` of the session that reads. Names are
decoded here; values stay bytes, since only their reader knows which of them are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from struct import Struct
from struct import error as StructError
from typing import TypeAlias

import msgspec

from ..core.errors import PayloadError
from ..core.rows import UNCHANGED as UNCHANGED
from ..core.rows import Value

# The values of all columns of the relation: bytes as the server sent them, and None for NULL.
Row: TypeAlias = tuple[Value, ...]


class Begin(msgspec.Struct, frozen=True):
    """The beginning of a transaction, which is sent once it has been committed.

    ``final_lsn`` is the ``lsn`` of its Commit. ``at_us`` is the time of the commit, in µs since
    1970: the origin's, if the session had a replication origin.
    """

    final_lsn: int
    at_us: int
    xid: int


class Commit(msgspec.Struct, frozen=True):
    """The end of a transaction; ``end_lsn`` is the position to acknowledge."""

    lsn: int
    end_lsn: int
    at_us: int


class Origin(msgspec.Struct, frozen=True):
    """The replication origin of the transaction, and the position of its commit there."""

    lsn: int
    name: str


class RelationColumn(msgspec.Struct, frozen=True):
    """A published column; ``key``: it belongs to the replica identity."""

    name: str
    type_oid: int
    modifier: int
    key: bool


class Relation(msgspec.Struct, frozen=True):
    """A table, as the rows that follow have it; it comes again whenever that may have changed.

    ``identity`` is its replica identity, as in ``pg_class.relreplident``: ``d``efault, ``n``othing,
    ``f``ull or ``i``ndex.
    """

    oid: int
    schema: str
    name: str
    identity: str
    columns: tuple[RelationColumn, ...]


class Type(msgspec.Struct, frozen=True):
    """A type that is not built in, before the first Relation with a column of it."""

    oid: int
    schema: str
    name: str


class Insert(msgspec.Struct, frozen=True):
    """A new row of the relation with this OID."""

    relation: int
    new: Row


class Update(msgspec.Struct, frozen=True):
    """A changed row; ``old`` is None where the server sends none: the identity is unchanged.

    ``keys_only``: ``old`` has the columns of the replica identity, and None for all others.
    """

    relation: int
    old: Row | None
    keys_only: bool
    new: Row


class Delete(msgspec.Struct, frozen=True):
    """A row that is gone; ``keys_only`` as in Update."""

    relation: int
    old: Row
    keys_only: bool


class Truncate(msgspec.Struct, frozen=True):
    """Tables that one statement has emptied; ``restart``: it restarted their sequences, too."""

    relations: tuple[int, ...]
    cascade: bool
    restart: bool


class Message(msgspec.Struct, frozen=True):
    """A message of ``pg_logical_emit_message``; the server does not convert its content."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


Change: TypeAlias = (
    Begin | Commit | Origin | Relation | Type | Insert | Update | Delete | Truncate | Message
)


def decode(data: bytes, encoding: str = "utf-8") -> Change:
    """Return the value of one message, whose names are in Python's ``encoding``.

    Raises PayloadError for anything that is not exactly one message.
    """
    try:
        decoder = _DECODERS.get(data[0])
        if decoder is None:
            raise PayloadError(f"pgoutput: a message that begins with {data[:1]!r}")
        change, end = decoder(data, encoding)
    except (IndexError, ValueError, StructError) as error:
        raise PayloadError(f"pgoutput: {len(data)} bytes are cut short: {error}") from error
    # A slice ends with the data, whatever length was asked for: here a length that lies shows.
    if end != len(data):
        raise PayloadError(f"pgoutput: {len(data)} bytes for a message of {end}")
    return change


# --- the parts of messages: each returns its value and where it ends ------------------------------

# Lengths and counts are read as unsigned, so that a negative one is beyond the end of any message.
# What is counted is read one by one: a count that lies costs no more than what is there.
_uint16 = Struct(">H").unpack_from
_uint32 = Struct(">I").unpack_from

_NULL, _TEXT, _TOASTED, _BINARY = b"ntub"
_WITHOUT_BYTES: dict[int, Value] = {_NULL: None, _TOASTED: UNCHANGED}


def _row(data: bytes, at: int) -> tuple[Row, int]:
    (count,) = _uint16(data, at)
    at += 2
    values: list[Value] = []
    for _ in range(count):
        kind = data[at]
        at += 1
        if kind == _TEXT:
            (length,) = _uint32(data, at)
            at += 4
            values.append(data[at : at + length])
            at += length
        elif kind == _NULL:
            values.append(None)
        elif kind == _TOASTED:
            values.append(UNCHANGED)
        elif kind == _BINARY:
            raise PayloadError("pgoutput: a value in binary format, which is not asked for")
        else:
            raise PayloadError(f"pgoutput: a value of the kind {kind:#x}")
    return tuple(values), at


def _string(data: bytes, at: int, encoding: str) -> tuple[str, int]:
    end = data.index(0, at)
    return data[at:end].decode(encoding, "surrogateescape"), end + 1


def _schema(data: bytes, at: int, encoding: str) -> tuple[str, int]:
    name, at = _string(data, at, encoding)
    return name or "pg_catalog", at


def _flags(flags: int, known: int) -> int:
    if flags & ~known:
        raise PayloadError(f"pgoutput: flags {flags:#x}, of which only {known:#x} are known")
    return flags


def _tag(data: bytes, at: int, allowed: bytes) -> int:
    tag = data[at]
    if tag not in allowed:
        raise PayloadError(f"pgoutput: {tag:#x} where one of {allowed!r} has to be")
    return tag


# The kinds of messages that change rows, by their first bytes.
INSERT, UPDATE, DELETE = b"IUD"


def relation_of(data: bytes) -> int:
    """Return the OID of the relation that a message of a changed row is about."""
    try:
        return int(_uint32(data, 1)[0])
    except StructError as error:
        raise PayloadError(f"pgoutput: {len(data)} bytes are cut short: {error}") from error


def picked(
    data: bytes, wanted: Sequence[bool]
) -> tuple[Sequence[Value] | None, Sequence[Value] | None]:
    """Return the wanted values of a changed row, before and after; None for no such row.

    ``wanted`` has a value for each of the first columns. An old row of a key has UNCHANGED in place
    of all other values, which did not come. Like ``decode``, but faster where a few of many columns
    are wanted: what follows them is not looked at. Raises PayloadError.
    """
    try:
        kind, tag = data[0], data[5]
        if kind == INSERT or (kind == UPDATE and tag == _NEW):
            return None, _picked(data, 6, wanted)
        if kind == DELETE:
            return _old(_picked(data, 6, wanted), tag), None
        old, at = _row(data, 6)
        _tag(data, at, b"N")
        return _old([*compress(old, wanted)], tag), _picked(data, at + 1, wanted)
    except (IndexError, StructError) as error:
        raise PayloadError(f"pgoutput: {len(data)} bytes are cut short: {error}") from error


def picked_rows(changes: Sequence[bytes], wanted: Sequence[bool]) -> list[list[Value]] | None:
    """Return the wanted values of rows changed in one way, as ``picked`` does, if each comes once.

    None where one comes before and after, or lacks a value that did not change.
    """
    try:
        kind = changes[0][0]
        if kind == UPDATE and any(data[5] != _NEW for data in changes):
            return None
        found = [_picked(data, 6, wanted) for data in changes]
        keys = kind == DELETE and any(data[5] == _OLD_KEY for data in changes)
    except (IndexError, StructError) as error:
        raise PayloadError(f"pgoutput: a row is cut short: {error}") from error
    if kind != INSERT and any(UNCHANGED in row or (keys and None in row) for row in found):
        return None
    return found


def _old(values: list[Value], tag: int) -> list[Value]:
    # What belongs to a replica identity is never NULL.
    return [UNCHANGED if v is None else v for v in values] if tag == _OLD_KEY else values


def _picked(data: bytes, at: int, wanted: Sequence[bool]) -> list[Value]:
    # Each row comes this way, so that what can be is done once for the row.
    (present,) = _uint16(data, at)
    if present < len(wanted):
        raise PayloadError(f"pgoutput: a row of {present} values, and not of {len(wanted)}")
    at += 2
    values: list[Value] = []
    for want in wanted:
        kind = data[at]
        if kind == _TEXT:
            (length,) = _uint32(data, at + 1)
            at += 5
            if want:
                values.append(data[at : at + length])
            at += length
        elif kind in _WITHOUT_BYTES:
            at += 1
            if want:
                values.append(_WITHOUT_BYTES[kind])
        else:
            raise PayloadError(f"pgoutput: a value of the kind {kind:#x}")
    if at > len(data):
        raise PayloadError(f"pgoutput: {len(data)} bytes for a row that needs {at}")
    return values


# --- the messages ---------------------------------------------------------------------------------

_EPOCH_US = 946_684_800_000_000  # 2000-01-01, from which PostgreSQL counts

_BEGIN = Struct(">xQqI")
_COMMIT = Struct(">xBQQq")
_ORIGIN = Struct(">xQ")
_OID = Struct(">xI")
_COLUMN = Struct(">Ii")
_TRUNCATE = Struct(">xIB")
_MESSAGE = Struct(">xBQ")

_OLD_KEY, _NEW = b"KN"


def decode_begin(data: bytes) -> Begin:
    """Return what ``decode`` returns for a Begin. Raises PayloadError."""
    try:
        final_lsn, at_us, xid = _BEGIN.unpack(data)
    except StructError as error:
        raise PayloadError(f"pgoutput: {len(data)} bytes for a Begin: {error}") from error
    return Begin(final_lsn, at_us + _EPOCH_US, xid)


def decode_commit(data: bytes) -> Commit:
    """Return what ``decode`` returns for a Commit. Raises PayloadError."""
    try:
        flags, lsn, end_lsn, at_us = _COMMIT.unpack(data)
    except StructError as error:
        raise PayloadError(f"pgoutput: {len(data)} bytes for a Commit: {error}") from error
    if flags:
        _flags(flags, 0)
    return Commit(lsn, end_lsn, at_us + _EPOCH_US)


def _origin(data: bytes, encoding: str) -> tuple[Origin, int]:
    (lsn,) = _ORIGIN.unpack_from(data)
    name, end = _string(data, _ORIGIN.size, encoding)
    return Origin(lsn, name), end


def _relation(data: bytes, encoding: str) -> tuple[Relation, int]:
    (oid,) = _OID.unpack_from(data)
    schema, at = _schema(data, _OID.size, encoding)
    name, at = _string(data, at, encoding)
    identity = chr(_tag(data, at, b"dnfi"))
    (count,) = _uint16(data, at + 1)
    at += 3
    columns = []
    for _ in range(count):
        key = _flags(data[at], 1)
        column, at = _string(data, at + 1, encoding)
        type_oid, modifier = _COLUMN.unpack_from(data, at)
        columns.append(RelationColumn(column, type_oid, modifier, bool(key)))
        at += _COLUMN.size
    return Relation(oid, schema, name, identity, tuple(columns)), at


def _type(data: bytes, encoding: str) -> tuple[Type, int]:
    (oid,) = _OID.unpack_from(data)
    schema, at = _schema(data, _OID.size, encoding)
    name, end = _string(data, at, encoding)
    return Type(oid, schema, name), end


def _insert(data: bytes, encoding: str) -> tuple[Insert, int]:
    (relation,) = _uint32(data, 1)
    _tag(data, 5, b"N")
    new, end = _row(data, 6)
    return Insert(relation, new), end


def _update(data: bytes, encoding: str) -> tuple[Update, int]:
    (relation,) = _uint32(data, 1)
    tag, at, old = _tag(data, 5, b"KON"), 6, None
    if tag != _NEW:
        old, at = _row(data, at)
        _tag(data, at, b"N")
        at += 1
    new, end = _row(data, at)
    return Update(relation, old, tag == _OLD_KEY, new), end


def _delete(data: bytes, encoding: str) -> tuple[Delete, int]:
    (relation,) = _uint32(data, 1)
    tag = _tag(data, 5, b"KO")
    old, end = _row(data, 6)
    return Delete(relation, old, tag == _OLD_KEY), end


def _truncate(data: bytes, encoding: str) -> tuple[Truncate, int]:
    count, flags = _TRUNCATE.unpack_from(data)
    _flags(flags, 3)
    end = _TRUNCATE.size + 4 * count
    relations = tuple(_uint32(data, at)[0] for at in range(_TRUNCATE.size, end, 4))
    return Truncate(relations, bool(flags & 1), bool(flags & 2)), end


def _message(data: bytes, encoding: str) -> tuple[Message, int]:
    flags, lsn = _MESSAGE.unpack_from(data)
    transactional = _flags(flags, 1) == 1
    prefix, at = _string(data, _MESSAGE.size, encoding)
    (length,) = _uint32(data, at)
    at += 4
    return Message(transactional, lsn, prefix, data[at : at + length]), at + length


_DECODERS: dict[int, Callable[[bytes, str], tuple[Change, int]]] = {
    ord("B"): lambda data, _: (decode_begin(data), len(data)),
    ord("C"): lambda data, _: (decode_commit(data), len(data)),
    ord("O"): _origin,
    ord("R"): _relation,
    ord("Y"): _type,
    ord("I"): _insert,
    ord("U"): _update,
    ord("D"): _delete,
    ord("T"): _truncate,
    ord("M"): _message,
}
