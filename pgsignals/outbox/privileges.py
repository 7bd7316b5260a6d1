"""The privileges that a role needs to be a consumer of the outbox."""

from __future__ import annotations

from psycopg2.extensions import cursor as Cursor

from ..postgres.privileges import Right, current_role, grants, lacking
from . import schema
from .schema import NAME, SEGMENTS

_WRITTEN = (
    "consumers",
    "members",
    "dead_letters",
    "parked",
    "parked_lost",
    "processed",
    "segments",
    "backfills",
    "backfill_parts",
)
_SEQUENCES = ("outbox_id", "outbox_full", "outbox_segment", "outbox_shed")


def _needed(relation: str, kind: str) -> tuple[str, ...]:
    if kind == "S":
        return ("SELECT", "UPDATE") if relation in _SEQUENCES else ()
    if relation in _WRITTEN:
        return ("SELECT", "INSERT", "UPDATE", "DELETE")
    if relation in {f"outbox_{segment}" for segment in range(SEGMENTS)}:
        return ("SELECT", "TRUNCATE")
    return ("SELECT",)


def missing_grants(cursor: Cursor) -> list[str]:
    """Return the GRANT statements that the current role needs yet to be a consumer."""
    cursor.execute(
        "SELECT c.relname, c.relkind FROM pg_catalog.pg_class c"
        " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relkind IN ('r', 'p', 'S') ORDER BY c.relname",
        (NAME,),
    )
    # Other relations are a newer version's, and only its programs need them.
    known = schema.relations()
    wanted = [
        Right(privilege, (NAME, relation), "SEQUENCE" if kind == "S" else "TABLE")
        for relation, kind in cursor.fetchall()
        if relation in known
        for privilege in _needed(relation, kind)
    ]
    lacks = lacking(cursor, [Right("USAGE", (NAME,), "SCHEMA"), *wanted])
    return grants(cursor, current_role(cursor), lacks)
