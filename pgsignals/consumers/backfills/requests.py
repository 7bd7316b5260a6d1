"""Asks for backfills, follows, lists and cancels them, by their rows in the database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ...core.errors import (
    ConfigurationError,
    DatabaseError,
    PayloadError,
    PrivilegeError,
    TableError,
    near,
)
from ...core.payload import Layout
from ...postgres.connection import opened
from ...postgres.session_settings import error_position
from ...triggers.names import wake_statement

# The notification by which the active consumer learns that a backfill was asked for or cancelled.
NOTICE = "backfill"
POLL_SECONDS = 0.2
# Rows are counted up to this number; for more, the planner's estimate is good enough.
_COUNTED = 100_000


@dataclass(frozen=True)
class BackfillState:
    """A backfill: ``state`` is ``running``, ``done``, ``failed`` or ``cancelled``.

    ``error`` says why it failed or, while it is running, what it waits for.
    ``done`` counts the rows gone through, of about ``total``; ``delivered`` the acknowledged events
    of those that met the condition.
    """

    id: int
    consumer: str
    schema: str
    table: str
    label: str | None
    condition: str | None
    state: str
    error: str | None
    total: int
    done: int
    delivered: int
    started_at: datetime
    changed_at: datetime

    @property
    def target(self) -> str:
        """The table, or the label, for people."""
        return self.label if self.label is not None else f"{self.schema}.{self.table}"


# Each partition of the consumer goes through all rows, so that ``done`` is their average.
_STATES = """
SELECT b.id, b.consumer, b.schema_name, b.table_name, b.label, b.condition,
       CASE WHEN b.state = 'running' AND p.finished THEN 'done' ELSE b.state END,
       CASE WHEN b.state <> 'running' OR NOT p.finished THEN b.error END,
       CASE WHEN b.state = 'running' AND p.finished THEN p.done ELSE greatest(b.total, p.done) END,
       p.done, p.delivered, b.started_at, greatest(b.changed_at, p.changed_at)
FROM pgsignals.backfills AS b
CROSS JOIN LATERAL (
  SELECT pg_catalog.bool_and(finished) AS finished,
         (pg_catalog.sum(done) / pg_catalog.count(*))::bigint AS done,
         pg_catalog.sum(delivered)::bigint AS delivered, pg_catalog.max(changed_at) AS changed_at
  FROM pgsignals.backfill_parts WHERE backfill = b.id
) AS p
"""


def backfills(cursor: Cursor) -> list[BackfillState]:
    """Return all backfills that are not forgotten, the latest last."""
    cursor.execute(f"{_STATES} ORDER BY b.id")
    return [BackfillState(*row) for row in cursor.fetchall()]


def backfill(cursor: Cursor, number: int) -> BackfillState:
    """Return a backfill. Raises DatabaseError when there is none with this id."""
    cursor.execute(f"{_STATES} WHERE b.id = %s", (number,))
    row = cursor.fetchone()
    if row is None:
        raise DatabaseError(f"There is no backfill {number}: see `pgsignals backfills list`.")
    return BackfillState(*row)


def cancel(cursor: Cursor, number: int) -> bool:
    """Cancel a backfill; False if it had ended. Raises DatabaseError for an unknown id."""
    if backfill(cursor, number).state != "running":
        return False
    cursor.execute(
        "UPDATE pgsignals.backfills SET state = 'cancelled',"
        " changed_at = pg_catalog.clock_timestamp() WHERE id = %s AND state = 'running'",
        (number,),
    )
    cancelled = cursor.rowcount == 1
    cursor.execute(wake_statement(NOTICE))
    return cancelled


def check_delivered(
    cursor: Cursor, consumer: str, schema: str, table: str, label: str | None
) -> None:
    """Raise ConfigurationError unless the consumer's watchers deliver this table or label.

    Raises DatabaseError for a consumer that is not there.
    """
    _parts(cursor, consumer)
    cursor.execute(
        "SELECT DISTINCT d.definition FROM pgsignals.consumers AS c"
        " JOIN pgsignals.channels AS d ON d.channel = ANY (c.channels) WHERE c.name = %s",
        (consumer,),
    )
    found = set()
    for (text,) in cursor.fetchall():
        try:
            layout = Layout.decode(text)
        except PayloadError:
            continue  # Only a newer version understands it.
        found.add((layout.schema, layout.table, layout.label))
    if (schema, table, label) not in found:
        listed = sorted(f"{s}.{t}" + (f" --label {own}" if own else "") for s, t, own in found)
        what = f"{schema}.{table}" + (f" by the label {label!r}" if label is not None else "")
        raise ConfigurationError(
            f"The consumer {consumer!r} does not watch {what}. It watches: "
            f"{', '.join(listed) or 'nothing'}."
        )


def request(
    cursor: Cursor,
    consumer: str,
    schema: str,
    table: str,
    label: str | None = None,
    model: str | None = None,
    condition: str | None = None,
    chunk: int = 1000,
) -> int:
    """Ask the consumer to deliver the rows of a table; return the backfill's id.

    ``model`` is a model's name, where watchers without a label have several for the table.
    Raises ConfigurationError for a condition that PostgreSQL rejects, TableError without a primary
    key, DatabaseError for a consumer that is not there.
    """
    if condition is not None and (not isinstance(condition, str) or not condition.strip()):
        raise ConfigurationError(
            f"where={condition!r}: give an SQL condition over the row, or None."
        )
    if not isinstance(chunk, int) or not 1 <= chunk <= 100_000:
        raise ConfigurationError(
            f"chunk={chunk!r}: give a whole number of rows, from 1 to 100,000."
        )
    parts = _parts(cursor, consumer)
    cursor.execute("SELECT pg_catalog.current_schemas(false)")
    [(schemas,)] = cursor.fetchall()
    path = sql.SQL(", ").join(map(sql.Identifier, schemas)).as_string(cursor)
    try:
        total = _total(cursor, schema, table)
        if condition is not None:
            _check_condition(cursor, _source(cursor, schema, table), condition)
    except psycopg2.errors.InsufficientPrivilege as error:
        raise PrivilegeError(
            f"This role may not read {schema}.{table}: {error.diag.message_primary}. A backfill "
            "reads the rows as the consumer's role: GRANT it SELECT."
        ) from error
    cursor.execute(
        "WITH asked AS ("
        " INSERT INTO pgsignals.backfills"
        " (consumer, schema_name, table_name, table_oid, label, model, condition, search_path,"
        " chunk, total) VALUES (%(consumer)s, %(schema)s, %(table)s,"
        " pg_catalog.to_regclass(pg_catalog.format('%%I.%%I', %(schema)s::text, %(table)s::text)),"
        " %(label)s, %(model)s, %(condition)s, %(path)s, %(chunk)s, %(total)s) RETURNING id"
        "), parts AS ("
        " INSERT INTO pgsignals.backfill_parts (backfill, part)"
        " SELECT id, part FROM asked, pg_catalog.generate_series(0, %(parts)s - 1) AS part"
        ") SELECT id FROM asked",
        {
            "consumer": consumer,
            "schema": schema,
            "table": table,
            "label": label,
            "model": model,
            "condition": condition,
            "path": path,
            "chunk": chunk,
            "total": total,
            "parts": parts,
        },
    )
    [(number,)] = cursor.fetchall()
    cursor.execute(wake_statement(NOTICE))
    return int(number)


def _parts(cursor: Cursor, consumer: str) -> int:
    cursor.execute("SELECT name, parts FROM pgsignals.consumers WHERE NOT ephemeral AND part = 0")
    known = dict(cursor.fetchall())
    if consumer not in known:
        raise DatabaseError(
            f"There is no consumer {consumer!r}{near(consumer, known)} See `pgsignals consumers "
            "list`; one begins when a process of its name is first started."
        )
    return int(known[consumer])


def _source(cursor: Cursor, schema: str, table: str) -> sql.Composable:
    """Return the table as in FROM. Raises TableError if it is missing or lacks a primary key."""
    cursor.execute(
        "SELECT c.relkind, EXISTS (SELECT FROM pg_catalog.pg_index AS i"
        " WHERE i.indrelid = c.oid AND i.indisprimary AND i.indisvalid)"
        " FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')",
        (schema, table),
    )
    row = cursor.fetchone()
    if row is None:
        raise TableError(f"There is no table {schema}.{table}.")
    kind, has_key = row
    if not has_key:
        raise TableError(
            f"{schema}.{table} has no primary key, in whose order a backfill goes: give it one "
            "(ALTER TABLE … ADD PRIMARY KEY)."
        )
    name = sql.Identifier(schema, table)
    return name if kind == "p" else sql.SQL("ONLY {}").format(name)


def _total(cursor: Cursor, schema: str, table: str) -> int:
    """Return the number of rows: counted if they are few, otherwise as the planner estimates."""
    source = _source(cursor, schema, table)
    cursor.execute(sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {}").format(source))
    [(plan,)] = cursor.fetchall()
    estimate = int(plan[0]["Plan"]["Plan Rows"])
    if estimate > _COUNTED:
        return estimate
    cursor.execute(
        sql.SQL("SELECT pg_catalog.count(*) FROM (SELECT FROM {} LIMIT {}) AS few").format(
            source, sql.Literal(2 * _COUNTED)
        )
    )
    [(count,)] = cursor.fetchall()
    return int(count)


def _check_condition(cursor: Cursor, source: sql.Composable, condition: str) -> None:
    """Raise ConfigurationError unless PostgreSQL can plan the condition as in a chunk."""
    head = (
        sql.SQL("EXPLAIN SELECT FROM (SELECT * FROM {}) AS new WHERE (\n")
        .format(source)
        .as_string(cursor)
    )
    try:
        cursor.execute(f"{head}{condition}\n)")
    except psycopg2.errors.InsufficientPrivilege:
        raise
    except psycopg2.Error as error:
        if error.pgcode is None:
            raise
        where = ""
        if (found := error_position(error)) is not None:
            position = found - len(head)
            if 0 < position <= len(condition):
                where = f" at character {position} ({condition[position - 1 :][:20]!r})"
        raise ConfigurationError(
            f"PostgreSQL rejects where={condition!r}: {error.diag.message_primary}{where}. It is "
            "an SQL condition over a row's columns, and must be true or false."
        ) from error


class Backfill:
    """A backfill that was asked for; it goes on without this object.

    Each attribute asks the database: ``status`` has them all from one moment.
    """

    def __init__(self, dsn: str, number: int) -> None:
        self._dsn = dsn
        self.id = number

    @property
    def status(self) -> BackfillState:
        """The state by now. Raises DatabaseError once it is forgotten, days after its end."""
        with opened(self._dsn) as cursor:
            return backfill(cursor, self.id)

    @property
    def state(self) -> str:
        """``running``, ``done``, ``failed`` or ``cancelled``."""
        return self.status.state

    @property
    def done(self) -> int:
        """The number of rows that were read and whose events are acknowledged."""
        return self.status.done

    @property
    def total(self) -> int:
        """The number of rows to read: of many, as the planner estimates."""
        return self.status.total

    def wait(self, timeout: float | None = None) -> bool:
        """Block until all rows are delivered and acknowledged (True).

        False after ``timeout`` seconds, and when it is cancelled. Raises DatabaseError, with the
        reason, when it has failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for status in self.follow():
            if status.state != "running":
                break
            if deadline is not None and time.monotonic() >= deadline:
                return False
        if status.state == "failed":
            raise DatabaseError(f"Backfill {self.id} of {status.target} failed: {status.error}")
        return status.state == "done"

    def follow(self, every: float = POLL_SECONDS) -> Iterator[BackfillState]:
        """Yield the state every so many seconds, until the backfill has ended."""
        with opened(self._dsn) as cursor:
            while True:
                status = backfill(cursor, self.id)
                yield status
                if status.state != "running":
                    return
                time.sleep(every)

    def cancel(self) -> bool:
        """End it; what is with receivers is still delivered. False when it had ended already."""
        with opened(self._dsn) as cursor:
            return cancel(cursor, self.id)

    def __repr__(self) -> str:
        return f"<Backfill {self.id}>"
