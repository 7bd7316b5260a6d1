"""Statements for the migrations of other tools, on their connections and in their transactions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg2.extensions
from psycopg2 import sql
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from ..core.errors import ConfigurationError, InstallLockError
from ..core.tables import Resolver
from ..core.transport import Capture, Transport
from ..core.watchers import Watcher
from ..outbox import schema
from ..postgres.connection import connect
from ..triggers import names
from ..triggers.catalogue import Installed, read_installed
from ..triggers.definitions import define
from ..triggers.installer import lock_holders, plan
from ..triggers.publications import creating_publications, publishing, tidying
from ..triggers.rows import serving
from ..triggers.sql import Trigger, publication_of, registration
from ..triggers.table_lookup import describe, resolve
from ..wal.publication import missing_publications

Rows = list[tuple[Any, ...]]

_LOCK_NOT_AVAILABLE = "55P03"
_NO_TRANSACTION = "25P01"


@dataclass(frozen=True)
class Change:
    """Statements that bring a database to what watchers need, and those that bring it back.

    ``summary`` has a line for each trigger: ``+ updated on public.orders``. ``lasting`` has one for
    what is not brought back: the schema of durable delivery, which others may use by then.
    """

    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()
    lasting: tuple[str, ...] = ()

    def reversed(self) -> Change:
        """Return the change that brings the database back."""
        signs = str.maketrans("+-", "-+")
        summary = tuple(line[:1].translate(signs) + line[1:] for line in self.summary)
        return Change(self.backward, self.forward, summary)


class BorrowedCursor(Cursor):
    """Runs statements through somebody else's connection, of whatever driver.

    Its own connection is for the quoting alone, which psycopg2 does by a connection.
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
    """Yield a cursor whose statements, without parameters, ``run`` runs.

    If the driver is not psycopg2, ``dsn()`` is the address of a connection for the quoting.
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


def run(
    cursor: Cursor, statements: Sequence[str], savepoint: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Run a change, all of it or nothing, within the caller's transaction.

    It does not try again, as a start does: tables that the migration has locked before would stay
    locked, with their writers waiting. So it fails soon, and says who was in the way.
    Raises InstallLockError, and ConfigurationError outside of a transaction.
    """
    statement = ""
    try:
        with savepoint():
            for statement in statements:
                cursor.execute(statement)
    except Exception as error:
        codes = sqlstates(error)
        if _NO_TRANSACTION in codes:
            raise ConfigurationError(
                "Installing takes a transaction, in which all comes or nothing: take the operation "
                "out of autocommit_block()."
            ) from error
        if _LOCK_NOT_AVAILABLE not in codes:
            raise
        place = _place(cursor, statement)
        if place is None:
            where = "Another installer or migration is at work"
        else:
            where = f"The table {'.'.join(place)} is locked, and its writers would wait behind us"
        raise InstallLockError(
            f"{where}.{lock_holders(cursor, *(place or ('', None)))} Nothing was installed: run "
            "the migration again when that has ended."
        ) from error


def sqlstates(error: BaseException | None) -> set[str]:
    """Return PostgreSQL's codes for an error and its causes, of whatever driver or framework."""
    found = set()
    while error is not None:
        for known in (error, getattr(error, "orig", None)):
            for attribute in ("pgcode", "sqlstate"):
                if isinstance(code := getattr(known, attribute, None), str):
                    found.add(code)
        error = error.__cause__
    return found


_MAKES_A_TRIGGER = re.compile(
    r"(?:CREATE TRIGGER .+? AFTER \w+ ON|ALTER TABLE|LOCK TABLE) (.+?)\s+"
    r"(?:REFERENCING|FOR EACH|ENABLE|IN SHARE)",
    re.DOTALL,
)
_OURS = re.compile(rf"{names.PREFIX}[0-9a-f]{{16}}")


def _place(cursor: Cursor, statement: str) -> tuple[str, str] | None:
    """Return the schema and name of the table that a statement of ours has to lock."""
    condition = None
    if (made := _MAKES_A_TRIGGER.match(statement)) is not None:
        condition = sql.SQL("c.oid = pg_catalog.to_regclass({})").format(sql.Literal(made[1]))
    elif (ours := _OURS.search(statement)) is not None:
        condition = sql.SQL(
            "c.oid IN (SELECT tgrelid FROM pg_catalog.pg_trigger"
            " WHERE tgname = {} AND tgparentid = 0)"
        ).format(sql.Literal(ours[0]))
    if condition is None:
        return None
    cursor.execute(
        sql.SQL(
            "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c"
            " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE {}"
        ).format(condition)
    )
    row = cursor.fetchone()
    return None if row is None else (row[0], row[1])


def creating(
    cursor: Cursor, namespace: str, wanted: Sequence[Trigger], transport: Transport
) -> Change:
    """Return what makes the triggers that are missing or outdated, and what they need."""
    version = schema.read_version(cursor) if transport.durable else schema.VERSION
    # Triggers of a former schema, which was dropped, are unknown to the one that is made now.
    installed = read_installed(cursor, namespace) if version else []
    created = plan(wanted, installed).created
    needed = []
    if transport is Transport.WAL:
        needed = missing_publications(cursor)
    return _change(cursor, created, [], needed, with_schema=version < schema.VERSION)


def pruning(cursor: Cursor, namespace: str, wanted: Sequence[Trigger]) -> Change:
    """Return what removes the triggers that no watcher needs and that nobody listens to."""
    found = plan(wanted, read_installed(cursor, namespace))
    return _change(cursor, [], [item for item in found.unwanted if not item.in_use])


@dataclass(frozen=True)
class Wanted:
    """Watchers, and the namespace and the transport that their triggers are to have."""

    watchers: Sequence[Watcher]
    resolvers: Sequence[Resolver]
    namespace: str
    transport: Transport
    capture: Capture | None = None

    def installing(self, cursor: Cursor) -> Change:
        """Return what installs the watchers' triggers: see ``creating``."""
        namespace, transport = self.namespace, self.transport
        found = define(
            cursor, self.watchers, self.resolvers, namespace, transport, capture=self.capture
        )
        return creating(cursor, namespace, [each.trigger for each in found], transport)

    def removing(self, cursor: Cursor) -> Change:
        """Return what removes the watchers' triggers, of either transport and any definition."""
        identities = set()
        for watcher in self.watchers:
            ref, _ = resolve(watcher.model, self.resolvers)
            table = describe(cursor, ref)
            identities |= {(table.schema, table.name, op, watcher.label) for op in watcher.ops}
        items = [
            item
            for item in read_installed(cursor, self.namespace)
            if (item.schema, item.table, item.tag.op, item.tag.label) in identities
        ]
        return _change(cursor, [], items)


# ``Wanted.installing`` or ``Wanted.removing``.
Planning = Callable[[Wanted, Cursor], Change]


def source(watcher: Watcher, model: str) -> str:
    """Return the Python that declares a watcher, of a table or model by its name."""
    parts = [repr(model), *map(repr, watcher.ops)]
    default = Watcher(None)
    for name in ("columns", "when", "extra", "label", "replicated"):
        value = getattr(watcher, name)
        if value != getattr(default, name):
            parts.append(f"{name}={list(value) if isinstance(value, tuple) else value!r}")
    return f"pgsignals.watch({', '.join(parts)})"


def _change(
    cursor: Cursor,
    created: Sequence[Trigger],
    removed: Sequence[Installed],
    publications: Sequence[str] = (),
    with_schema: bool = False,
) -> Change:
    forward: list[str] = [*publications]
    backward: list[str] = []
    summary: list[str] = []
    lasting: tuple[str, ...] = ()
    if with_schema:
        forward.append(schema.ensuring_statement())
        lasting = (f"+ the schema {schema.NAME}, version {schema.VERSION}",)
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
    if any(trigger.spec.transport is Transport.WAL for trigger in created):
        backward.append(tidying(whole=True))
    if any(item.transport is Transport.WAL for item in removed):
        forward.append(tidying(whole=True))
    return Change(_locking(forward), _locking(backward), tuple(summary), lasting)


def _named(op: str, table: str, label: str | None) -> str:
    return f"{op} on {table}" + (f" (label {label!r})" if label is not None else "")


def _locking(statements: Sequence[str]) -> tuple[str, ...]:
    """Return statements that wait two seconds for other installers, and half a second for a table.

    A table's writers wait behind us as long, and behind what the migration has locked before.
    """
    if not statements:
        return ()
    setting = "'pgsignals.lock_timeout'"
    return (
        f"SELECT pg_catalog.set_config({setting}, "
        "pg_catalog.current_setting('lock_timeout'), true)",
        "SELECT pg_catalog.set_config('lock_timeout', '2s', true)",
        names.INSTALL_LOCKING,
        "SELECT pg_catalog.set_config('lock_timeout', '500ms', true)",
        *statements,
        "SELECT pg_catalog.set_config('lock_timeout', coalesce(nullif(pg_catalog.current_setting("
        f"{setting}, true), ''), pg_catalog.current_setting('lock_timeout')), true)",
    )


def _drop(cursor: Cursor, home: str, hashed: str) -> str:
    """Return what removes a trigger, unless somebody listens to it, who would be deaf unawares.

    Nor is a trigger removed that a durable consumer reads, which may be down. A role that cannot
    read whether there is such a consumer leaves the trigger.
    """
    name, parts = names.object_name(hashed), names.listener_parts(hashed)
    return (
        sql.SQL(
            "DO $pgsignals$ DECLARE\n"
            "  consumed boolean := false;\n"
            "BEGIN\n"
            "  PERFORM pg_catalog.pg_advisory_xact_lock({lock_class}, {removal});\n"
            "  IF pg_catalog.to_regnamespace('pgsignals') IS NOT NULL AND EXISTS (\n"
            "    SELECT FROM pg_catalog.pg_proc p\n"
            "    WHERE p.proname = {literal}\n"
            "      AND (p.prosecdef OR pg_catalog.strpos(\n"
            "        pg_catalog.obj_description(p.oid, 'pg_proc'), '\"rows\": true') > 0)\n"
            "      AND p.pronamespace = pg_catalog.to_regnamespace({home}))\n"
            "  THEN\n"
            "    IF pg_catalog.has_schema_privilege('pgsignals', 'USAGE')\n"
            "      AND pg_catalog.has_table_privilege('pgsignals.consumers', 'SELECT')\n"
            "    THEN\n"
            "      consumed := EXISTS (SELECT FROM pgsignals.consumers\n"
            "        WHERE NOT ephemeral AND channels @> ARRAY[{channel}]);\n"
            "    ELSE\n"
            "      consumed := true;\n"
            "    END IF;\n"
            "  END IF;\n"
            "  IF consumed THEN\n"
            "    RAISE WARNING 'a consumer reads what {name} is for, so that it is left: see"
            " pgsignals consumers';\n"
            "  ELSIF EXISTS (\n"
            "    SELECT FROM pg_catalog.pg_locks l\n"
            "    JOIN (VALUES {parts}) AS part (number, bits)\n"
            "      ON l.objid::bigint >> {bits} = part.number\n"
            "      AND l.objid::bigint & part.bits = part.bits\n"
            "    WHERE l.locktype = 'advisory' AND l.classid = {listeners} AND l.objsubid = 2\n"
            "      AND l.granted AND l.database = (SELECT oid FROM pg_catalog.pg_database\n"
            "        WHERE datname = pg_catalog.current_database())\n"
            "    GROUP BY l.pid HAVING pg_catalog.count(DISTINCT part.number) = {number})\n"
            "  THEN\n"
            "    RAISE WARNING 'somebody listens to {name}, so that it is left';\n"
            "  ELSE\n"
            "    DROP FUNCTION IF EXISTS {function}() CASCADE;\n"
            "  END IF;\n"
            "END $pgsignals$"
        )
        .format(
            lock_class=sql.SQL(str(names.LOCK_CLASS)),
            removal=sql.SQL(str(names.REMOVAL_LOCK)),
            listeners=sql.SQL(str(names.LISTENER_CLASS)),
            bits=sql.SQL(str(names.LISTENER_BITS)),
            parts=sql.SQL(", ").join(
                sql.SQL("({}, {}::bigint)").format(sql.Literal(number), sql.Literal(bits))
                for number, bits in parts
            ),
            number=sql.SQL(str(len(parts))),
            channel=sql.SQL(f"({names.channel_key(hashed)})::bigint"),
            function=sql.Identifier(home, name),
            home=sql.Literal(f'"{home.replace(chr(34), chr(34) * 2)}"'),
            literal=sql.Literal(name),
            name=sql.SQL(name),
        )
        .as_string(cursor)
    )


_DEFINITION = """
SELECT pg_catalog.pg_get_functiondef(p.oid), pg_catalog.obj_description(p.oid, 'pg_proc'),
       p.prosecdef, pg_catalog.pg_get_triggerdef(t.oid), t.tgenabled::text, n.nspname, c.relname
FROM pg_catalog.pg_proc p
JOIN pg_catalog.pg_namespace f ON f.oid = p.pronamespace
LEFT JOIN pg_catalog.pg_trigger t
  ON t.tgfoid = p.oid AND t.tgname = p.proname AND t.tgparentid = 0
LEFT JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE f.nspname = %s AND p.proname = %s AND p.pronargs = 0 ORDER BY t.oid
"""


_REGISTERED = "SELECT definition FROM pgsignals.channels WHERE channel = %s"


def _definition(cursor: Cursor, item: Installed) -> list[str]:
    """Return statements that make an installed trigger again."""
    cursor.execute(_DEFINITION, (item.function_schema, item.name))
    rows = cursor.fetchall()
    if not rows:
        return []
    function, comment, durable, *_ = rows[0]
    named = sql.Identifier(item.function_schema, item.name)
    statements: list[sql.Composable] = []
    tables = [sql.Identifier(each.schema, each.table).as_string(cursor) for each in item.fired]
    if item.tag.rows:
        publication = publication_of(item.tag.op)
        for each in (*creating_publications(), *(publishing(t, publication) for t in tables)):
            statements.append(sql.SQL(each))
    statements += [
        sql.SQL(function.rstrip()),
        sql.SQL("GRANT EXECUTE ON FUNCTION {}() TO PUBLIC").format(named),
        sql.SQL("COMMENT ON FUNCTION {}() IS {}").format(named, sql.Literal(comment)),
    ]
    for *_, trigger, enabled, home, table in rows:
        if trigger is None:
            continue
        statements.append(sql.SQL(trigger))
        if enabled == "A":
            statements.append(
                sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(
                    sql.Identifier(home, table), sql.Identifier(item.name)
                )
            )
    if (durable or item.tag.rows) and schema.read_version(cursor):
        cursor.execute(_REGISTERED, (names.channel_key(item.hash),))
        registered = cursor.fetchone()
        if registered is not None:
            statements += registration(
                item.function_schema,
                item.hash,
                registered[0],
                item.transport,
                *([serving(tables)] if item.tag.rows else []),
            )
    return [statement.as_string(cursor) for statement in statements]
