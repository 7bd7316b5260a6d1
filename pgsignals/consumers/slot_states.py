"""The replication slots of consumers of the write-ahead log, as an operator sees and drops them."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from psycopg2 import errors as pg
from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..core.errors import DatabaseError, PrivilegeError
from ..postgres.privileges import current_role

# How long to wait for the session that has read from a slot.
_FREE_SECONDS = 5.0


@dataclass(frozen=True)
class SlotState:
    """The replication slot of a consumer.

    The server keeps ``retained_bytes`` of the write-ahead log for it, and may give it up once
    ``safe_bytes`` more have been written, or nobody has read from it for ``safe_seconds`` more;
    None if it never does. ``status`` is reserved, extended, unreserved or lost, and
    ``invalidation`` why it is of no use any more, or empty. ``active``: a session reads from it.
    ``inactive_since`` is None while one does, and where the server does not tell: that is before
    PostgreSQL 17. What comes before the LSN ``begins`` is not read from it any more; None while it
    is being made, which waits for the transactions that are writing.
    """

    name: str
    active: bool
    status: str | None
    retained_bytes: int
    safe_bytes: int | None
    invalidation: str
    inactive_since: datetime | None
    safe_seconds: float | None
    begins: int | None


# By to_jsonb(), a column that this version lacks is NULL. A standby has no present position.
_SLOTS = """
SELECT s.slot_name::text, s.active, s.wal_status,
    coalesce(pg_catalog.pg_wal_lsn_diff(CASE WHEN pg_catalog.pg_is_in_recovery()
      THEN pg_catalog.pg_last_wal_replay_lsn() ELSE pg_catalog.pg_current_wal_insert_lsn() END,
      s.restart_lsn), 0)::pg_catalog.int8,
    s.safe_wal_size,
    coalesce(
        j.columns OPERATOR(pg_catalog.->>) 'invalidation_reason',
        CASE j.columns OPERATOR(pg_catalog.->>) 'conflicting' WHEN 'true' THEN 'conflicting' END,
        CASE s.wal_status WHEN 'lost' THEN 'wal_removed' END, ''),
    t.inactive_since, extract(epoch FROM t.inactive_since + w.most
      - pg_catalog.clock_timestamp())::pg_catalog.float8,
    pg_catalog.pg_wal_lsn_diff(s.confirmed_flush_lsn, '0/0')::pg_catalog.int8
FROM pg_catalog.pg_replication_slots AS s
CROSS JOIN LATERAL (SELECT pg_catalog.to_jsonb(s.*) AS columns) AS j
CROSS JOIN LATERAL (SELECT (j.columns OPERATOR(pg_catalog.->>) 'inactive_since')
  ::pg_catalog.timestamptz AS inactive_since) AS t
-- Of PostgreSQL 18, in seconds; 0 is for ever.
LEFT JOIN LATERAL (SELECT pg_catalog.make_interval(secs => setting::pg_catalog.float8)
  FROM pg_catalog.pg_settings
  WHERE name = 'idle_replication_slot_timeout' AND setting <> '0') AS w(most) ON true
WHERE s.database = pg_catalog.current_database() AND NOT s.temporary
  AND s.slot_name LIKE 'pgsignals\\_%'
ORDER BY 1
"""


def read_slots(cursor: Cursor) -> dict[str, SlotState]:
    """Return the slots of ours in this database that outlive their sessions, by their names."""
    cursor.execute(_SLOTS)
    return {row[0]: SlotState(*row) for row in cursor.fetchall()}


def drop_slots(cursor: Cursor, names: Collection[str]) -> None:
    """Drop those of these slots that are there.

    The server may take a moment to notice that a reader has ended. Raises PrivilegeError, or
    DatabaseError while a session goes on reading.
    """
    deadline = time.monotonic() + _FREE_SECONDS
    while True:
        try:
            cursor.execute(
                "SELECT pg_catalog.pg_drop_replication_slot(slot_name)"
                " FROM pg_catalog.pg_replication_slots"
                " WHERE slot_name = ANY (%s) AND database = pg_catalog.current_database()",
                (list(names),),
            )
            return
        except pg.InsufficientPrivilege as error:
            role = sql.Identifier(current_role(cursor)).as_string(cursor)
            fix = "; ".join(dropping(name) for name in names)
            raise PrivilegeError(
                f"This role may not drop replication slots, for which the server keeps its log. "
                f"Have one run ALTER ROLE {role} REPLICATION, or this: {fix}."
            ) from error
        except pg.ObjectInUse as error:
            if time.monotonic() >= deadline:
                raise DatabaseError(
                    f"{error.diag.message_primary}: end that session, and try again."
                ) from error
        time.sleep(0.05)


def dropping(name: str) -> str:
    """Return the statement that drops a slot."""
    return f"SELECT pg_drop_replication_slot('{name}')"
