"""The privileges that the current role lacks, and the GRANTs that give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor


class Right(NamedTuple):
    """A privilege, of a whole table or of columns in parentheses.

    ``name`` has the schema first. ``kind`` is GRANT's word for the object, empty for a table.
    """

    privilege: str
    name: tuple[str, ...]
    kind: str = ""

    def __str__(self) -> str:
        kind = f"the {self.kind.lower()} " if self.kind else ""
        return f"{self.privilege} on {kind}{'.'.join(self.name)}"


_LACKING = r"""
SELECT r.number
FROM ROWS FROM (pg_catalog.unnest(%s::text[]), pg_catalog.unnest(%s::text[]),
                pg_catalog.unnest(%s::text[]), pg_catalog.unnest(%s::text[]))
  WITH ORDINALITY AS r (privilege, schema, name, kind, number)
JOIN pg_catalog.pg_namespace n ON n.nspname = r.schema
LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = r.name
LEFT JOIN pg_catalog.pg_proc p ON p.pronamespace = n.oid AND p.proname = r.name
WHERE NOT CASE r.kind
  WHEN 'SCHEMA' THEN pg_catalog.has_schema_privilege(n.oid, r.privilege)
  WHEN 'SEQUENCE' THEN pg_catalog.has_sequence_privilege(c.oid, r.privilege)
  WHEN 'FUNCTION' THEN pg_catalog.has_function_privilege(p.oid, r.privilege)
  ELSE coalesce(
    (SELECT pg_catalog.bool_and(pg_catalog.has_column_privilege(
       c.oid, found[1], pg_catalog.split_part(r.privilege, ' ', 1)))
     FROM pg_catalog.regexp_matches(r.privilege, '(\w+)[,)]', 'g') AS found),
    pg_catalog.has_table_privilege(c.oid, r.privilege))
  END
ORDER BY r.number
"""


def lacking(cursor: Cursor, rights: Sequence[Right]) -> list[Right]:
    """Return the rights that the current role lacks, without those on missing objects."""
    names = [(*right.name, "")[:2] for right in rights]
    parameters = (
        [right.privilege for right in rights],
        [schema for schema, _ in names],
        [name for _, name in names],
        [right.kind for right in rights],
    )
    cursor.execute(_LACKING, parameters)
    return [rights[number - 1] for (number,) in cursor.fetchall()]


def current_role(cursor: Cursor) -> str:
    """Return the name of the role whose rights count."""
    cursor.execute("SELECT current_user")
    [(role,)] = cursor.fetchall()
    return str(role)


def grants(cursor: Cursor, role: str, rights: Iterable[Right]) -> list[str]:
    """Return the statements that give a role these rights, one for all objects with the same."""
    lacks: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for privilege, name, kind in rights:
        lacks.setdefault((kind, name), []).append(privilege)
    alike: dict[str, list[sql.Composable]] = {}
    for (kind, name), privileges in lacks.items():
        what = f"GRANT {', '.join(privileges)} ON {kind}{' ' if kind else ''}{{}} TO {{}}"
        alike.setdefault(what, []).append(sql.Identifier(*name))
    return [
        sql.SQL(what).format(sql.SQL(", ").join(names), sql.Identifier(role)).as_string(cursor)
        for what, names in alike.items()
    ]
