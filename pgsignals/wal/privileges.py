"""The privileges that a role needs to read the write-ahead log, beside those of every consumer."""

from __future__ import annotations

from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..consumers.schema import NAME
from ..postgres.privileges import Right, current_role, grants, lacking

# Amazon's way, since only a superuser may give REPLICATION.
_RDS = "rds_replication"


def missing_grants(cursor: Cursor) -> list[str]:
    """Return the statements that give the current role what it lacks yet."""
    role = current_role(cursor)
    found = grants(
        cursor, role, lacking(cursor, [Right("SELECT", (NAME, "wal_secret"), "SEQUENCE")])
    )
    if (statement := lacks_replication(cursor)) is not None:
        found.append(statement)
    return found


def lacks_replication(cursor: Cursor) -> str | None:
    """Return the statement by which the current role may read the log; None if it may."""
    cursor.execute(
        "SELECT r.rolreplication OR r.rolsuper, h.oid IS NOT NULL,"
        " coalesce(pg_catalog.pg_has_role(r.oid, h.oid, 'MEMBER'), false)"
        " FROM pg_catalog.pg_roles AS r"
        " LEFT JOIN pg_catalog.pg_roles AS h ON h.rolname = %s WHERE r.rolname = current_user",
        (_RDS,),
    )
    [(may, hosted, member)] = cursor.fetchall()
    if may or member:
        return None
    statement = sql.SQL("GRANT {} TO {}" if hosted else "ALTER ROLE {1} REPLICATION")
    role = sql.Identifier(current_role(cursor))
    return statement.format(sql.Identifier(_RDS), role).as_string(cursor)
