"""What a role needs to be a consumer of the outbox."""

from __future__ import annotations

from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from .schema import NAME, SLOTS

_WRITTEN = (
    "consumers",
    "members",
    "dead_letters",
    "processed",
    "slots",
    "backfills",
    "backfill_parts",
)
_SEQUENCES = ("outbox_id", "outbox_full", "outbox_slot", "outbox_shed")


def _needed(relation: str, kind: str) -> tuple[str, ...]:
    if kind == "S":
        return ("SELECT", "UPDATE") if relation in _SEQUENCES else ()
    if relation in _WRITTEN:
        return ("SELECT", "INSERT", "UPDATE", "DELETE")
    if relation in {f"outbox_{slot}" for slot in range(SLOTS)}:
        return ("SELECT", "TRUNCATE")
    return ("SELECT",)


def missing_grants(cursor: Cursor) -> list[str]:
    """The GRANT statements without which the current role cannot be a consumer."""
    cursor.execute(
        "SELECT current_user, n.oid, pg_catalog.has_schema_privilege(n.oid, 'USAGE')"
        " FROM pg_catalog.pg_namespace n WHERE n.nspname = %s",
        (NAME,),
    )
    [(role, schema, usable)] = cursor.fetchall()
    to = sql.Identifier(role)
    found = []
    if not usable:
        found.append(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(NAME), to))
    cursor.execute(
        "SELECT oid, relname, relkind FROM pg_catalog.pg_class"
        " WHERE relnamespace = %s AND relkind IN ('r', 'p', 'S') ORDER BY relname",
        (schema,),
    )
    lacking: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for oid, relation, kind in cursor.fetchall():
        has = "has_sequence_privilege" if kind == "S" else "has_table_privilege"
        lacks = []
        for privilege in _needed(relation, kind):
            cursor.execute(f"SELECT pg_catalog.{has}(%s::pg_catalog.oid, %s)", (oid, privilege))
            [(held,)] = cursor.fetchall()
            if not held:
                lacks.append(privilege)
        if lacks:
            what = "SEQUENCE" if kind == "S" else "TABLE"
            lacking.setdefault((what, tuple(lacks)), []).append(relation)
    for (what, privileges), relations in lacking.items():
        found.append(
            sql.SQL("GRANT {} ON {} {} TO {}").format(
                sql.SQL(", ").join(map(sql.SQL, privileges)),
                sql.SQL(what),
                sql.SQL(", ").join(sql.Identifier(NAME, each) for each in relations),
                to,
            )
        )
    return [statement.as_string(cursor) for statement in found]
