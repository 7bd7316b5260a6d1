"""The checks of a database, one after the other."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from ...core.errors import ConnectError, WatcherError
from ...core.tables import Resolver, Table
from ...core.transport import Capture, Transport
from ...core.watchers import Watcher
from ...postgres.connection import connect, opened
from ...postgres.notification_queue import QUEUE_WARNING, read_queue_usage
from ...postgres.waiter import Waiter
from ...triggers.inspection import read_states
from ...triggers.installer import MISSING, OUTDATED, STALE, State
from ...triggers.table_lookup import describe, resolve
from .findings import FAIL, OK, WARN, Finding, Outcome, fail, ok, warn
from .outbox import examine_outbox
from .wal import examine_wal

OLDEST_VERSION = 14
QUEUE_FAILURE = 0.75
ROUND_TRIP_SECONDS = 5.0


def examine(
    dsn: str,
    watchers: Sequence[Watcher],
    resolvers: Sequence[Resolver],
    namespace: str | None,
    transport: Transport = Transport.NOTIFY,
    capture: Capture | None = None,
) -> Iterator[Finding]:
    """Run every check, one after the other; without a connection, that is the only finding.

    Without a namespace, the triggers of all are looked at.
    """
    try:
        connection = connect(dsn)
    except ConnectError as error:
        yield Finding("connection", FAIL, str(error), "Mend the connection string or the server.")
        return
    with closing(connection), connection.cursor() as cursor:
        yield Finding("connection", *_connection(connection, cursor))
        yield Finding("version", *_version(connection))
        writable = Finding("writable", *_writable(cursor))
        yield writable
        yield Finding("pooler", *_pooler(connection, cursor))
        if writable.level == OK:
            yield Finding("round trip", *_round_trip(connection, cursor, dsn))
        yield Finding("queue", *_queue(cursor))
        yield Finding("replication role", *_replication_role(cursor))
        states = read_states(cursor, watchers, resolvers, namespace, transport, capture)
        yield Finding("triggers", *_triggers(states, namespace))
        yield from _privileges(cursor, watchers, resolvers, states)
        yield from examine_outbox(cursor)
        yield from examine_wal(cursor, transport, states)


def _connection(connection: Connection, cursor: Cursor) -> Outcome:
    (user, database) = _row(cursor, "SELECT current_user, pg_catalog.current_database()")
    where = connection.info.host or "a local socket"
    return ok(f"database {database!r} at {where} as {user!r}")


def _version(connection: Connection) -> Outcome:
    number = connection.server_version
    version = f"PostgreSQL {number // 10000}.{number % 10000}"
    if number // 10000 >= OLDEST_VERSION:
        return ok(version)
    return fail(version, f"Upgrade the server to PostgreSQL {OLDEST_VERSION} or newer.")


def _writable(cursor: Cursor) -> Outcome:
    standby, read_only = _row(
        cursor,
        "SELECT pg_catalog.pg_is_in_recovery(),"
        " pg_catalog.current_setting('transaction_read_only')::bool",
    )
    if standby:
        return fail(
            "this is a standby, which delivers no notifications",
            "Connect to the primary: with several hosts in the DSN, add "
            "target_session_attrs=read-write.",
        )
    if read_only:
        return fail(
            "transactions are read-only here, so that no trigger can be installed",
            "Set default_transaction_read_only to off for this role or database.",
        )
    return ok("a primary that takes writes")


def _pooler(connection: Connection, cursor: Cursor) -> Outcome:
    (pid,) = _row(cursor, "SELECT pg_catalog.pg_backend_pid()")
    # A pooler makes up the process id that it tells its clients.
    if pid == connection.info.backend_pid:
        return ok("connected to the server itself")
    return warn(
        "something between us and the server pools connections",
        "Make sure that the pool's mode is session, or give start(listen_dsn=…) the server's own "
        "address: LISTEN belongs to a session.",
    )


def _round_trip(connection: Connection, cursor: Cursor, dsn: str) -> Outcome:
    channel = f"pgsignals_doctor_{secrets.token_hex(8)}"
    cursor.execute(f"LISTEN {channel}")
    began = time.monotonic()
    # Sent by another connection, since a pooler may well hand us what we send to ourselves.
    with opened(dsn) as sender, closing(Waiter()) as waiter:
        sender.execute(f"NOTIFY {channel}")
        while not any(each.channel == channel for each in connection.notifies):
            left = began + ROUND_TRIP_SECONDS - time.monotonic()
            if left <= 0:
                return fail(
                    f"a notification did not arrive within {ROUND_TRIP_SECONDS:g} s",
                    "Give start(listen_dsn=…) the server's own address, or connect through a pool "
                    "in session mode: in PgBouncer that is pool_mode = session.",
                )
            waiter.wait(connection.fileno(), left)
            connection.poll()
    cursor.execute(f"UNLISTEN {channel}")
    return ok(f"a notification took {1000 * (time.monotonic() - began):.0f} ms")


def _queue(cursor: Cursor) -> Outcome:
    usage = read_queue_usage(cursor)
    message = f"the notification queue is {usage:.0%} full"
    if usage < QUEUE_WARNING:
        return ok(message)
    cursor.execute(
        "SELECT pid FROM pg_catalog.pg_stat_activity"
        " WHERE state LIKE 'idle in transaction%' ORDER BY xact_start LIMIT 5"
    )
    pids = ", ".join(str(pid) for (pid,) in cursor.fetchall())
    fix = "End the listener that has stayed in a transaction: when the queue is full, commits fail."
    if pids:
        fix += f" Idle in transaction: pid {pids}; SELECT pg_terminate_backend(pid) ends one."
    return FAIL if usage >= QUEUE_FAILURE else WARN, message, fix


def _replication_role(cursor: Cursor) -> Outcome:
    cursor.execute(
        "SELECT coalesce('role ' || pg_catalog.quote_ident(r.rolname), 'all roles') ||"
        " coalesce(' in database ' || pg_catalog.quote_ident(d.datname), '')"
        " FROM pg_catalog.pg_db_role_setting s"
        " LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole"
        " LEFT JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase"
        " WHERE 'session_replication_role=replica' = ANY (s.setconfig)"
        " AND (s.setdatabase = 0 OR d.datname = pg_catalog.current_database())"
    )
    found = [who for (who,) in cursor.fetchall()]
    (setting,) = _row(cursor, "SELECT pg_catalog.current_setting('session_replication_role')")
    if setting == "replica" and not found:
        found = ["this session"]
    if not found:
        return ok("nobody writes past the triggers by default")
    return warn(
        f"session_replication_role is 'replica' for {', '.join(found)}: triggers stay silent",
        "Reset it there, or use watch(…, replicated=True), whose triggers always fire.",
    )


def _triggers(states: Sequence[State], namespace: str | None) -> Outcome:
    def listed(status: str) -> list[str]:
        return [
            f"{state.op} on {'.'.join(filter(None, (state.schema, state.table)))}"
            + (f" ({state.detail})" if state.detail else "")
            for state in states
            if state.status == status
        ]

    outdated, missing, stale = listed(OUTDATED), listed(MISSING), listed(STALE)
    if outdated:
        return fail(
            f"outdated: {'; '.join(outdated)}",
            "Run `pgsignals install` with these watchers, or restart the application that has "
            "them; where a column has gone, mend the watcher first.",
        )
    if missing:
        return warn(
            f"missing: {'; '.join(missing)}",
            "Run `pgsignals install` with these watchers; start() does so itself unless install= "
            'is "check" or "off".',
        )
    if stale:
        return warn(
            f"stale: {'; '.join(stale)}",
            "Start the application that has them, or run `pgsignals uninstall`.",
        )
    where = "all namespaces" if namespace is None else f"namespace {namespace!r}"
    return ok(f"{len(states)} in {where}, none that differs")


def _privileges(
    cursor: Cursor,
    watchers: Sequence[Watcher],
    resolvers: Sequence[Resolver],
    states: Sequence[State],
) -> Iterator[Finding]:
    """Check whether this role could install triggers; if all are installed, it need not."""
    seen: set[tuple[int, bool]] = set()
    for watcher in watchers:
        try:
            ref, _ = resolve(watcher.model, resolvers)
            table = describe(cursor, ref)
        except WatcherError as error:
            yield Finding("privileges", FAIL, str(error), "Mend the watcher or the table.")
            continue
        if (table.oid, watcher.replicated) in seen:
            continue
        seen.add((table.oid, watcher.replicated))
        published = any(
            state.served == "rows"
            for state in states
            if (state.schema, state.table) == (table.schema, table.name)
        )
        lacks = _lacking(cursor, table, watcher.replicated, published)
        if not lacks:
            yield Finding("privileges", OK, f"this role may install triggers on {table.qualified}")
            continue
        needed = any(
            state.status in (MISSING, OUTDATED)
            for state in states
            if (state.schema, state.table) == (table.schema, table.name)
        )
        message = (
            f"this role cannot install triggers on {table.qualified}: it {' and '.join(lacks)}"
        )
        fix = 'Run `pgsignals install` as the owner and start with install="check", or GRANT them.'
        yield Finding("privileges", FAIL if needed else WARN, message, fix)


def _lacking(cursor: Cursor, table: Table, replicated: bool, published: bool) -> list[str]:
    owner, triggers, creates = _row(
        cursor,
        "SELECT pg_catalog.pg_has_role(c.relowner, 'USAGE'),"
        " pg_catalog.has_table_privilege(c.oid, 'TRIGGER'),"
        " pg_catalog.has_schema_privilege(c.relnamespace, 'CREATE')"
        f" FROM pg_catalog.pg_class c WHERE c.oid = {table.oid:d}",
    )
    found = []
    if published and not owner:
        found.append("does not own the table, as publishing its rows needs")
    # ENABLE ALWAYS is an ALTER TABLE, for which TRIGGER is not enough.
    elif replicated and not owner:
        found.append("does not own the table, as replicated=True needs")
    elif not triggers:
        found.append("lacks TRIGGER on the table")
    if not creates:
        found.append(f"lacks CREATE on schema {table.schema}")
    return found


def _row(cursor: Cursor, query: str) -> tuple[object, ...]:
    cursor.execute(query)
    row = cursor.fetchone()
    assert row is not None
    return row
