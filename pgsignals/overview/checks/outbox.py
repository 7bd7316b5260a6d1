"""The checks of an outbox, in a database that has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timezone
from itertools import groupby

from psycopg2.extensions import cursor as Cursor

from ...core.errors import DatabaseError
from ...outbox import schema
from ...outbox.inspection import ConsumerState, OutboxState, read_outbox
from ...outbox.privileges import missing_grants
from ...outbox.retention_settings import Retention, read_retention
from .findings import FAIL, OK, WARN, Finding, Outcome, fail, ok, warn

# A consumer at work that is further behind does not keep up.
LAG_SECONDS = 60.0
# The shares of the retention, in time or size, from which on events are about to be lost.
SHARE_WARNING, SHARE_FAILURE = 0.5, 0.9
# The seconds that a transaction may hold a partition before it is worth a word.
HELD_SECONDS = 60.0

_RETENTION = "or keep more with `pgsignals retention`"


def examine_outbox(cursor: Cursor, held_seconds: float = HELD_SECONDS) -> Iterator[Finding]:
    """Run every check of the outbox; none if there is no outbox."""
    try:
        version = schema.read_version(cursor)
    except DatabaseError as error:
        yield Finding(
            "outbox", FAIL, str(error), "Without durable delivery it does no harm; see the message."
        )
        return
    if not version:
        return
    if version < schema.VERSION:
        yield Finding(
            "outbox",
            FAIL,
            f"its schema has version {version}, and this pgsignals needs {schema.VERSION}",
            "Run `pgsignals install --delivery outbox` (or wal) with your watchers, as the "
            "schema's owner.",
        )
        return
    grants = missing_grants(cursor)
    if grants:
        yield Finding(
            "outbox privileges",
            WARN,
            "this role cannot be a consumer of the outbox, and what follows is not checked",
            f"Have the schema's owner run: {'; '.join(grants)};",
        )
        return
    try:
        lacking = schema.left_out(cursor)
    except DatabaseError as error:
        yield Finding("outbox", FAIL, str(error), "See the message.")
        return
    if lacking:
        yield Finding(
            "outbox",
            FAIL,
            f"its schema comes from a dump that left something out: {lacking}",
            "Run `pgsignals install --delivery outbox` (or wal) with your watchers, or restart the "
            "application that has them.",
        )
        return
    outbox, kept = read_outbox(cursor), read_retention(cursor)
    yield Finding("outbox privileges", OK, "this role may be a consumer")
    yield Finding("trigger rights", *_rights(cursor))
    yield Finding("outbox", *_size(cursor, version, outbox, kept))
    yield Finding("consumers", *_consumers(outbox, kept))
    yield Finding("slow receivers", *_parked(outbox))
    yield Finding("dead letters", *_dead_letters(cursor))
    yield Finding("partitions", *_partitions(cursor, held_seconds))


def _rights(cursor: Cursor) -> Outcome:
    """Check whether trigger functions lend a superuser's rights to the owner of a table."""
    cursor.execute(
        "SELECT DISTINCT n.nspname || '.' || c.relname, pg_catalog.pg_get_userbyid(c.relowner),"
        " r.rolname"
        " FROM pg_catalog.pg_trigger t"
        " JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid AND p.prosecdef"
        " JOIN pg_catalog.pg_roles r ON r.oid = p.proowner AND r.rolsuper"
        " JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid"
        " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE t.tgparentid = 0 AND p.proname LIKE 'pgsignals\\_%'"
        " AND NOT pg_catalog.pg_has_role(c.relowner, p.proowner, 'MEMBER') ORDER BY 1"
    )
    found = cursor.fetchall()
    if not found:
        return ok("no table's owner is lent a superuser's")
    listed = "; ".join(f"{table}, of {owner!r}, those of {role!r}" for table, owner, role in found)
    return warn(
        f"the owner of a table could use a superuser's rights by its triggers: {listed}",
        "Remove these triggers with `pgsignals uninstall`, and install them as that owner: with "
        "options=-crole%3DOWNER in the connection's URL.",
    )


def _size(cursor: Cursor, version: int, outbox: OutboxState, kept: Retention) -> Outcome:
    share = outbox.bytes / kept.bytes
    message = f"version {version}, {outbox.bytes / 2**20:.1f} MiB, {share:.0%} of what it may have"
    fix = f"Have the consumers that are behind catch up, or drop them, {_RETENTION} --size."
    cursor.execute("SELECT last_value FROM pgsignals.outbox_full")
    [(full,)] = cursor.fetchall()
    if full:
        return fail(
            f"{message}: it is full, no consumer runs, and events are left out",
            f"Start a consumer, {_RETENTION} --size.",
        )
    if share >= SHARE_WARNING:
        return FAIL if share >= SHARE_FAILURE else WARN, message, fix
    return ok(message)


def _consumers(outbox: OutboxState, kept: Retention) -> Outcome:
    bad: list[str] = []
    worst, idle = OK, False
    for name, group in groupby(outbox.consumers, lambda each: each.name):
        parts = list(group)
        level, problem = _lateness(name, parts, outbox, kept)
        if problem:
            bad.append(problem)
            worst = FAIL if FAIL in (worst, level) else WARN
            idle = idle or not all(part.active for part in parts)
    if not bad:
        count = len({each.name for each in outbox.consumers})
        return ok(f"{count} known, none of them late")
    fix = (
        "Start its process, or run `pgsignals consumers drop` if nobody needs it"
        if idle
        else "Give it more workers or partitions, or make its receivers quicker"
    )
    return worst, "; ".join(bad), f"{fix}, {_RETENTION}."


def _lateness(
    name: str, parts: Sequence[ConsumerState], outbox: OutboxState, kept: Retention
) -> tuple[str, str]:
    """Return the level and the problem of a consumer; no problem if it is not late."""
    # The lag of each part counts the events of all.
    lag = max(part.lag for part in parts)
    dropped = (part.lost_until for part in parts if part.lost_until is not None)
    lost = max((each.astimezone(timezone.utc) for each in dropped), default=None)
    seconds = max(part.lag_seconds for part in parts)
    active = all(part.active for part in parts)
    if lost is not None:
        return FAIL, f"{name!r} was so late that events up to {lost:%Y-%m-%d %H:%M}Z are dropped"
    # What is unread of the write-ahead log is a matter of slots: see examine_wal.
    if not lag or (active and seconds < LAG_SECONDS):
        return OK, ""
    share = max(seconds / kept.seconds, outbox.bytes / kept.bytes)
    who = "is behind" if active else "is behind, and no process reads for it"
    near = f", {share:.0%} of what is kept" if share >= SHARE_WARNING else ""
    level = FAIL if share >= SHARE_WARNING else WARN
    return level, f"{name!r} {who}: {lag:,} events, {seconds:,.0f} s{near}"


def _parked(outbox: OutboxState) -> Outcome:
    if not outbox.parked:
        return ok("none has events parked for it")
    listed = ", ".join(
        f"{each.events:,} of {each.consumer!r} for {each.receiver}" for each in outbox.parked
    )
    return warn(
        f"events wait for single receivers, and the others have gone on: {listed}",
        "Make the receiver quicker, or see what it hangs in; a process of the consumer delivers "
        f"them once it takes events again, {_RETENTION}.",
    )


def _dead_letters(cursor: Cursor) -> Outcome:
    cursor.execute("SELECT consumer, count(*) FROM pgsignals.dead_letters GROUP BY 1 ORDER BY 1")
    found = cursor.fetchall()
    if not found:
        return ok("none")
    listed = ", ".join(f"{count:,} of {consumer!r}" for consumer, count in found)
    return warn(
        listed,
        "See `pgsignals dead-letters list`; mend the receiver, then `pgsignals dead-letters retry "
        "--all`, or drop them.",
    )


# A partition is emptied under a lock that waits for nobody: any transaction that has written to it,
# or reads it, is in the way. The current one is not emptied.
_HOLDERS = """
SELECT c.relname, l.pid, coalesce(nullif(a.application_name, ''), a.backend_type, 'unnamed'),
       a.state, extract(epoch FROM pg_catalog.clock_timestamp() - a.xact_start)::int
FROM pg_catalog.pg_locks l
JOIN pg_catalog.pg_class c ON c.oid = l.relation
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'pgsignals'
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
CROSS JOIN pgsignals.outbox_segment s
WHERE l.granted AND c.relname ~ '^outbox_[0-9]+$' AND c.relname <> 'outbox_' || s.last_value
  AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_catalog.pg_database
                    WHERE datname = pg_catalog.current_database())
  AND coalesce(a.xact_start < pg_catalog.clock_timestamp() - %s * interval '1 s', true)
ORDER BY 1, 5 DESC NULLS FIRST
"""


def _partitions(cursor: Cursor, held_seconds: float) -> Outcome:
    cursor.execute(_HOLDERS, (held_seconds,))
    held: dict[object, str] = {}
    for partition, pid, name, state, age in cursor.fetchall():
        who = "a prepared transaction" if pid is None else f"pid {pid} ({name}, {state}, {age} s)"
        held.setdefault(pid, f"{who} holds {partition}")
    if not held:
        return ok("none is held by an old transaction")
    return warn(
        f"what has been read stays: {'; '.join(held.values())}",
        "End that transaction: SELECT pg_terminate_backend(pid), or ROLLBACK PREPARED.",
    )
