"""Writes the messages of pgoutput, as PostgreSQL does."""

from __future__ import annotations

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
    Row,
    Truncate,
    Type,
    Update,
)

# From 1970 to 2000, in µs.
EPOCH = 10_957 * 86_400 * 1_000_000


def encode(change: Change, encoding: str = "utf-8") -> bytes:
    """Return the message that stands for a change."""
    match change:
        case Begin(final_lsn, at_us, xid):
            return b"B" + _uint(8, final_lsn) + _time(at_us) + _uint(4, xid)
        case Commit(lsn, end_lsn, at_us):
            return b"C\0" + _uint(8, lsn) + _uint(8, end_lsn) + _time(at_us)
        case Origin(lsn, name):
            return b"O" + _uint(8, lsn) + _name(name, encoding)
        case Relation(oid, schema, name, identity, columns):
            head = _uint(4, oid) + _schema(schema, encoding) + _name(name, encoding)
            parts = [
                _uint(1, column.key)
                + _name(column.name, encoding)
                + _uint(4, column.type_oid)
                + column.modifier.to_bytes(4, "big", signed=True)
                for column in columns
            ]
            return b"R" + head + identity.encode() + _uint(2, len(parts)) + b"".join(parts)
        case Type(oid, schema, name):
            return b"Y" + _uint(4, oid) + _schema(schema, encoding) + _name(name, encoding)
        case Insert(relation, new):
            return b"I" + _uint(4, relation) + b"N" + _row(new)
        case Update(relation, old, keys_only, new):
            before = b"" if old is None else (b"K" if keys_only else b"O") + _row(old)
            return b"U" + _uint(4, relation) + before + b"N" + _row(new)
        case Delete(relation, old, keys_only):
            return b"D" + _uint(4, relation) + (b"K" if keys_only else b"O") + _row(old)
        case Truncate(relations, cascade, restart):
            oids = b"".join(_uint(4, oid) for oid in relations)
            return b"T" + _uint(4, len(relations)) + _uint(1, cascade + 2 * restart) + oids
        case Message(transactional, lsn, prefix, content):
            head = _uint(1, transactional) + _uint(8, lsn) + _name(prefix, encoding)
            return b"M" + head + _uint(4, len(content)) + content


def _uint(size: int, number: int) -> bytes:
    return int(number).to_bytes(size, "big")


def _time(at_us: int) -> bytes:
    return (at_us - EPOCH).to_bytes(8, "big", signed=True)


def _name(name: str, encoding: str) -> bytes:
    return name.encode(encoding, "surrogateescape") + b"\0"


def _schema(schema: str, encoding: str) -> bytes:
    return _name("" if schema == "pg_catalog" else schema, encoding)


def _row(row: Row) -> bytes:
    parts = []
    for value in row:
        if value is None:
            parts.append(b"n")
        elif value is UNCHANGED:
            parts.append(b"u")
        else:
            parts.append(b"t" + _uint(4, len(value)) + value)
    return _uint(2, len(parts)) + b"".join(parts)
