"""Statements for the migrations of other tools, whose connection and transaction are theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg2.extensions
from psycopg2 import sql
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from ..connection import connect
from ..tables import Resolver, describe, resolve
from ..triggers import names
from ..triggers.catalogue import Installed, read_installed
from ..triggers.installer import plan
from ..triggers.sql import Trigger
from ..watchers import Watcher

Rows = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Change:
    """Statements that bring a database to what watchers need, and those that bring it back.

    ``summary`` has a line for each trigger: ``+ updated on public.orders``.
    """

    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()


class BorrowedCursor(Cursor):
    """Runs statements through somebody else's connection, of whatever driver.

    Of its own connection it uses no more than the quoting, which psycopg2 does by a connection.
    """

    _run: Callable[[str], Rows]
    _rows: Iterator[tuple[Any, ...]]

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002
        encoding = psycopg2.extensions.encodings[self.connection.encoding]
        self._rows = iter(self._run(self.mogrify(query, vars).decode(encoding)))

    def fetchone(self) -> tuple[Any, ...] | None:
        return next(map(_as_psycopg2, self._rows), None)

    def fetchall(self) -> Rows:
        return list(map(_as_psycopg2, self._rows))


def _as_psycopg2(row: tuple[Any, ...]) -> tuple[Any, ...]:
    # asyncpg has bytes for the catalogue's "char".
    return tuple(value.decode() if isinstance(value, bytes) else value for value in row)


@contextmanager
def borrowed_cursor(
    driver_connection: object, dsn: Callable[[], str], run: Callable[[str], Rows]
) -> Iterator[Cursor]:
    """A cursor whose statements, without parameters, ``run`` runs.

    Where the driver is not psycopg2, ``dsn()`` says where a connection for the quoting is had.
    """
    own: Connection | None = None
    if not isinstance(driver_connection, Connection):
        own = driver_connection = connect(dsn())
    try:
        cursor = BorrowedCursor(driver_connection)
        cursor._run = run
        yield cursor
    finally:
        if own is not None:
            own.close()


def installing(cursor: Cursor, namespace: str, wanted: Sequence[Trigger]) -> Change:
    """What the triggers that are missing or outdated take."""
    return _change(cursor, plan(wanted, read_installed(cursor, namespace)).created, [])


def pruning(cursor: Cursor, namespace: str, wanted: Sequence[Trigger]) -> Change:
    """What removes triggers that no watcher needs and that nobody listens to."""
    found = plan(wanted, read_installed(cursor, namespace))
    return _change(cursor, [], [item for item in found.unwanted if not item.in_use])


def removing(
    cursor: Cursor, namespace: str, watchers: Sequence[Watcher], resolvers: Sequence[Resolver]
) -> Change:
    """What removes the triggers of watchers, however they were defined when they were installed."""
    identities = set()
    for watcher in watchers:
        ref, _ = resolve(watcher.model, resolvers)
        table = describe(cursor, ref)
        identities |= {(table.schema, table.name, op, watcher.label) for op in watcher.ops}
    items = [
        item
        for item in read_installed(cursor, namespace)
        if (item.schema, item.table, item.tag.op, item.tag.label) in identities
    ]
    return _change(cursor, [], items)


def source(watcher: Watcher, model: str) -> str:
    """The Python that declares a watcher, of a table or model by its name."""
    parts = [repr(model), *map(repr, watcher.ops)]
    default = Watcher(None)
    for name in ("columns", "when", "extra", "label", "replicated"):
        value = getattr(watcher, name)
        if value != getattr(default, name):
            parts.append(f"{name}={list(value) if isinstance(value, tuple) else value!r}")
    return f"pgsignals.watch({', '.join(parts)})"


def _change(cursor: Cursor, created: Sequence[Trigger], removed: Sequence[Installed]) -> Change:
    forward: list[str] = []
    backward: list[str] = []
    summary: list[str] = []
    for trigger in created:
        spec = trigger.spec
        # Dropping comes first, since the trigger may have come by other ways in the meantime.
        forward += [*trigger.drop, *trigger.create]
        backward.append(_drop(cursor, spec.table.schema, trigger.hash))
        summary.append(f"+ {_named(spec.op, spec.table.qualified, spec.label)}")
    for item in removed:
        forward.append(_drop(cursor, item.function_schema, item.hash))
        backward += _definition(cursor, item)
        summary.append(f"- {_named(item.tag.op, f'{item.schema}.{item.table}', item.tag.label)}")
    return Change(_locking(forward), _locking(backward), tuple(summary))


def _named(op: str, table: str, label: str | None) -> str:
    return f"{op} on {table}" + (f" (label {label!r})" if label is not None else "")


def _locking(statements: Sequence[str]) -> tuple[str, ...]:
    """Other installers wait for the end of the transaction; writers, for half a second at most."""
    if not statements:
        return ()
    setting = "'pgsignals.lock_timeout'"
    return (
        f"SELECT pg_catalog.set_config({setting}, "
        "pg_catalog.current_setting('lock_timeout'), true)",
        f"SELECT pg_catalog.pg_advisory_xact_lock({names.LOCK_CLASS}, {names.INSTALL_LOCK})",
        "SELECT pg_catalog.set_config('lock_timeout', '500ms', true)",
        *statements,
        "SELECT pg_catalog.set_config('lock_timeout', coalesce(nullif(pg_catalog.current_setting("
        f"{setting}, true), ''), pg_catalog.current_setting('lock_timeout')), true)",
    )


def _drop(cursor: Cursor, schema: str, hashed: str) -> str:
    """Remove a trigger unless somebody listens to it, who would be deaf without knowing it."""
    name = names.object_name(hashed)
    return (
        sql.SQL(
            "DO $pgsignals$ BEGIN\n"
            "  IF pg_catalog.pg_try_advisory_xact_lock({lock_class}, {key}) THEN\n"
            "    DROP FUNCTION IF EXISTS {function}() CASCADE;\n"
            "  ELSE\n"
            "    RAISE WARNING 'somebody listens to {name}, so that it is left';\n"
            "  END IF;\n"
            "END $pgsignals$"
        )
        .format(
            lock_class=sql.SQL(str(names.LOCK_CLASS)),
            key=sql.SQL(str(names.lock_key(hashed))),
            function=sql.Identifier(schema, name),
            name=sql.SQL(name),
        )
        .as_string(cursor)
    )


_DEFINITION = """
SELECT pg_catalog.pg_get_functiondef(p.oid), pg_catalog.obj_description(p.oid, 'pg_proc'),
       pg_catalog.pg_get_triggerdef(t.oid), t.tgenabled::text, n.nspname, c.relname
FROM pg_catalog.pg_proc p
JOIN pg_catalog.pg_namespace f ON f.oid = p.pronamespace
LEFT JOIN pg_catalog.pg_trigger t
  ON t.tgfoid = p.oid AND t.tgname = p.proname AND t.tgparentid = 0
LEFT JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE f.nspname = %s AND p.proname = %s AND p.pronargs = 0
"""


def _definition(cursor: Cursor, item: Installed) -> list[str]:
    """Statements that make what is installed again."""
    cursor.execute(_DEFINITION, (item.function_schema, item.name))
    row = cursor.fetchone()
    if row is None:
        return []
    function, comment, trigger, enabled, schema, table = row
    named = sql.Identifier(item.function_schema, item.name)
    statements: list[sql.Composable] = [
        sql.SQL(function.rstrip()),
        sql.SQL("REVOKE ALL ON FUNCTION {}() FROM PUBLIC").format(named),
        sql.SQL("COMMENT ON FUNCTION {}() IS {}").format(named, sql.Literal(comment)),
    ]
    if trigger is not None:
        statements.append(sql.SQL(trigger))
        if enabled == "A":
            statements.append(
                sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(
                    sql.Identifier(schema, table), sql.Identifier(item.name)
                )
            )
    return [statement.as_string(cursor) for statement in statements]
