"""Replication slots: the SQL that makes, looks at, ends and drops them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg2 import errors as pg

from ..core.errors import DatabaseError
from ..core.lsn import lsn_text, read_lsn
from ..triggers.names import slot_name as slot_name
from ..triggers.names import streams_slot as streams_slot

# Runs a statement, with its parameters, and returns its rows.
Execute = Callable[[str, Sequence[Any]], Sequence[tuple[Any, ...]]]

PLUGIN = "pgoutput"


class SlotTaken(DatabaseError):
    """Another session reads from the slot."""


class SlotMissing(DatabaseError):
    """There is no such slot."""


@dataclass(frozen=True)
class Slot:
    """A replication slot, as ``pg_replication_slots`` shows it.

    What a version of PostgreSQL does not tell is as if there were none of it.
    """

    name: str
    plugin: str | None
    database: str | None
    temporary: bool
    # The process id of the session that reads from it, if any.
    active_pid: int | None
    # What is acknowledged: a session that begins below begins here.
    confirmed: int | None
    # From here on the slot keeps the WAL; None once the WAL that it needs is gone.
    restart: int | None
    # reserved, extended, unreserved or lost.
    status: str | None
    # How many bytes may be written before the slot may be lost; None if it is never.
    safe_size: int | None
    # Why the slot is of no use any more; empty if it is.
    invalidation: str
    # Whether a standby has a copy, with which one goes on after a promotion.
    failover: bool
    # Whether what is prepared comes when it is prepared, which readers of ours do not understand.
    two_phase: bool


# By to_jsonb(), a column that this version lacks is NULL.
_LOOK = """
SELECT s.slot_name, s.plugin, s.database, s.temporary, s.active_pid,
    s.confirmed_flush_lsn::pg_catalog.text, s.restart_lsn::pg_catalog.text,
    s.wal_status, s.safe_wal_size,
    coalesce(
        j.columns OPERATOR(pg_catalog.->>) 'invalidation_reason',
        CASE j.columns OPERATOR(pg_catalog.->>) 'conflicting' WHEN 'true' THEN 'conflicting' END,
        CASE s.wal_status WHEN 'lost' THEN 'wal_removed' END, ''),
    coalesce((j.columns OPERATOR(pg_catalog.->>) 'failover')::pg_catalog.bool, false),
    coalesce((j.columns OPERATOR(pg_catalog.->>) 'two_phase')::pg_catalog.bool, false)
FROM pg_catalog.pg_replication_slots AS s
CROSS JOIN LATERAL (SELECT pg_catalog.to_jsonb(s.*) AS columns) AS j
WHERE s.slot_name OPERATOR(pg_catalog.=) %s
"""


def look(execute: Execute, name: str) -> Slot | None:
    """Return the slot of that name, if there is one."""
    for row in execute(_LOOK, (name,)):
        (slot, plugin, database, temporary, pid, confirmed, restart, *rest) = row
        return Slot(slot, plugin, database, temporary, pid, _lsn(confirmed), _lsn(restart), *rest)
    return None


def create(
    execute: Execute,
    name: str,
    version: int,
    seconds: float,
    *,
    temporary: bool = False,
    failover: bool = True,
) -> int:
    """Make the slot, and return the LSN from which on it gives what is committed.

    ``version`` is the server's number. It waits for the transactions that are writing, of all
    databases, for at most so many ``seconds``. Raises DatabaseError, which names them, then.
    """
    # From PostgreSQL 17 on a standby may have a copy, if it is set up to.
    copied = failover and not temporary and version >= 170000
    # By the server: one that only the client gave up would go on, and leave a slot behind.
    limit = f"SET LOCAL statement_timeout TO '{max(1, round(1000 * seconds))}ms'; "
    try:
        [(lsn,)] = execute(
            f"{limit}SELECT lsn::pg_catalog.text FROM"
            f" pg_catalog.pg_create_logical_replication_slot(%s, %s, %s"
            f"{', failover => true' if copied else ''})",
            (name, PLUGIN, temporary),
        )
    except pg.QueryCanceled as error:
        raise DatabaseError(
            f"The replication slot {name!r} could not be made within {seconds:g} s, since it has "
            "to wait for all transactions that are writing, in whatever database: "
            f"{in_the_way(execute)}. Commit them, or end them (pg_terminate_backend, "
            "ROLLBACK PREPARED), and start again."
        ) from error
    return read_lsn(lsn)


def copy(execute: Execute, source: str, name: str) -> None:
    """Make a temporary slot that begins where another one does.

    Unlike ``create``, it waits for no transactions. Another session may read from the source.
    """
    execute("SELECT FROM pg_catalog.pg_copy_logical_replication_slot(%s, %s, true)", (source, name))


def advance(execute: Execute, name: str, lsn: int) -> None:
    """Let the server forget what the slot keeps below an LSN, unless a session uses the slot."""
    # Another process may do the same.
    with contextlib.suppress(pg.ObjectInUse):
        execute("SELECT FROM pg_catalog.pg_replication_slot_advance(%s, %s)", (name, lsn_text(lsn)))


_IN_THE_WAY = """
SELECT CASE WHEN l.pid IS NULL THEN 'a prepared transaction' ELSE pg_catalog.regexp_replace(
    pg_catalog.concat(
      'process ', l.pid, ' of the database ', coalesce(a.datname, '?'), ' (',
      nullif(a.application_name, '') || ', ', coalesce(a.state, 'state hidden'),
      ', begun at ' || pg_catalog.date_trunc('second', a.xact_start), ')'),
    -- A walsender's session converts nothing.
    '[^ -~]', '?', 'g') END
FROM pg_catalog.pg_locks AS l LEFT JOIN pg_catalog.pg_stat_activity AS a USING (pid)
WHERE l.locktype OPERATOR(pg_catalog.=) 'transactionid' AND l.granted
    AND l.mode OPERATOR(pg_catalog.=) 'ExclusiveLock'
    AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
ORDER BY a.xact_start LIMIT %s
"""
_MOST_NAMED = 3


def in_the_way(execute: Execute) -> str:
    """Return, for people, the oldest transactions that are writing, of all databases.

    By their locks, which everybody may see, unlike the ids of others' transactions.
    """
    found = [text for (text,) in execute(_IN_THE_WAY, (_MOST_NAMED,))]
    return "; ".join(found) or "they have ended meanwhile"


def require_ours(slot: Slot) -> None:
    """Raise DatabaseError if somebody has made the slot so that readers of ours cannot use it."""
    if slot.plugin != PLUGIN or slot.two_phase:
        made = (
            "with two_phase" if slot.two_phase else f"for {slot.plugin or 'physical replication'}"
        )
        raise DatabaseError(
            f"The replication slot {slot.name!r} was made {made}, which cannot be read here: drop "
            "it (pg_drop_replication_slot), and it is made anew, with a Gap."
        )


def drop(execute: Execute, name: str) -> None:
    """Drop the slot, if there is one; an error of the server if a session reads from it."""
    execute(
        "SELECT pg_catalog.pg_drop_replication_slot(slot_name)"
        " FROM pg_catalog.pg_replication_slots WHERE slot_name OPERATOR(pg_catalog.=) %s",
        (name,),
    )


def end_holder(execute: Execute, slot: Slot) -> bool:
    """Have the server end the session that held the slot; return whether it held it still."""
    if slot.active_pid is None:
        return False
    # Asked again: by now the process id may be another session's.
    rows = execute(
        "SELECT pg_catalog.pg_terminate_backend(active_pid)"
        " FROM pg_catalog.pg_replication_slots WHERE slot_name OPERATOR(pg_catalog.=) %s"
        " AND active_pid OPERATOR(pg_catalog.=) %s",
        (slot.name, slot.active_pid),
    )
    return any(ended for (ended,) in rows)


def _lsn(text: str | None) -> int | None:
    return None if text is None else read_lsn(text)
