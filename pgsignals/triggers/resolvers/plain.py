"""Tables by their names, and the SQL by which all the resolvers find records again."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import psycopg2.extensions

from ...core.errors import ModelError
from ...core.tables import Column, Table, TableRef
from ...postgres.transaction import borrow
from ..quoting import quoted

_PART = r'(?:"((?:[^"\0]|"")+)"|([^".\0]+))'
_NAME = re.compile(rf"(?:{_PART}\.)?{_PART}")


class PlainResolver:
    """Text: ``orders``, ``public.orders``, ``"My Schema"."My.Table"``.

    Records are dicts by column name, through a psycopg2 or psycopg connection or cursor, an
    SQLAlchemy Session, Connection or Engine, or a Django connection.
    """

    name = "plain"

    def resolve(self, model: object) -> TableRef | None:
        if not isinstance(model, str):
            return None
        schema, name = parse_name(model)
        return TableRef(name, schema)

    def load(
        self, model: object, table: Table, session: object, ids: Sequence[tuple[object, ...]]
    ) -> list[Any] | None:
        sqlalchemy = sys.modules.get("sqlalchemy")
        if sqlalchemy is not None and isinstance(session, sqlalchemy.Engine):
            with session.connect() as connection:
                return self.load(model, table, connection, ids)
        borrowed = borrow(_connection_of(session))
        if borrowed is None:
            return None
        if not ids:
            return []
        wanted, parameters = wanted_keys(table, ids)
        columns = ", ".join(f"t.{quoted(column.name)}" for column in table.columns)
        same = " AND ".join(
            f"t.{quoted(name)} = wanted.k{number}" for number, name in enumerate(table.key)
        )
        rows = borrowed.execute(
            f"SELECT {columns} FROM {quoted(table.schema, table.name)} AS t "
            f"JOIN ({wanted}) AS wanted ON {same} ORDER BY wanted.position",
            parameters,
        )
        names = [column.attribute for column in table.columns]
        return [dict(zip(names, row, strict=True)) for row in rows]


def parse_name(text: str) -> tuple[str | None, str]:
    """Return the schema, if one is given, and the name of a table.

    A part in double quotes may hold anything, a quote being doubled, as in SQL. Unlike in SQL, a
    part without quotes is not folded to lower case: ``Order`` is the table that ``"Order"`` is in
    SQL. Raises ModelError for text that is no such name.
    """
    found = _NAME.fullmatch(text)
    if found is None:
        raise ModelError(
            f"{text!r} is not a table's name. Give 'table' or 'schema.table', with double quotes "
            "around a part that has a dot or a quote in it: '\"my.schema\".orders'."
        )
    quoted_schema, schema, quoted_name, name = (
        part and part.replace('""', '"') for part in found.groups()
    )
    return quoted_schema or schema, quoted_name or name


def wanted_keys(table: Table, ids: Sequence[tuple[object, ...]]) -> tuple[str, list[list[str]]]:
    """Return a query for the keys ``k0``, ``k1``, … with their ``position``, each key once.

    Its parameters are one list of texts for each column of the key, so that any number of keys
    makes one query. PostgreSQL itself reads the texts as the columns' types: otherwise a driver
    would decide what becomes of a UUID, an enum or a type of the user's own.
    """
    keys = dict.fromkeys(
        tuple(as_text(value, column) for value, column in zip(key, table.key_columns, strict=True))
        for key in ids
    )
    numbers = range(len(table.key))
    casts = ", ".join(
        f"CAST(k{number} AS {quoted(*column.base_type)}) AS k{number}"
        for number, column in enumerate(table.key_columns)
    )
    arrays = ", ".join("pg_catalog.unnest(CAST(%s AS text[]))" for _ in numbers)
    names = ", ".join(f"k{number}" for number in numbers)
    query = (
        f"SELECT {casts}, position "
        f"FROM ROWS FROM ({arrays}) WITH ORDINALITY AS keys ({names}, position)"
    )
    return query, [list(texts) for texts in zip(*keys, strict=True)]


def as_text(value: object, column: Column) -> str:
    """Return the value as a text that PostgreSQL reads alike whatever the session has set."""
    if column.base_type == ("pg_catalog", "jsonb"):
        return json.dumps(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "\\x" + bytes(value).hex()
    if isinstance(value, timedelta):
        return f"{value.days:+d} days {value.seconds:+d} seconds {value.microseconds:+d} us"
    if isinstance(value, list):
        return "{" + ",".join(_as_element(element, column) for element in value) + "}"
    return str(value)


def _as_element(value: object, column: Column) -> str:
    if value is None or isinstance(value, list):
        return "NULL" if value is None else as_text(value, column)
    return '"' + re.sub(r'(["\\])', r"\\\1", as_text(value, column)) + '"'


def _connection_of(session: Any) -> object:
    """Return the connection of a psycopg2 or psycopg cursor; anything else as it is."""
    psycopg = sys.modules.get("psycopg")
    cursors = (psycopg2.extensions.cursor, *((psycopg.Cursor,) if psycopg else ()))
    return session.connection if isinstance(session, cursors) else session
