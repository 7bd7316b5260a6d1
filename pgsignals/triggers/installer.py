"""Installs the triggers that the watchers need, and removes others of ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TypeVar

import psycopg2
from psycopg2 import errors as pg
from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..core.errors import (
    ConfigurationError,
    DatabaseError,
    DriftError,
    InstallLockError,
    PrivilegeError,
)
from ..core.logging import log
from ..core.rng import chance
from ..core.transport import Capture, Transport
from ..postgres.connection import transaction
from ..postgres.privileges import Right, current_role, grants, lacking
from . import names, publications
from .catalogue import Installed, normalized, read_installed, read_listeners
from .sql import Trigger, drop_statement

T = TypeVar("T")

INSTALLED, OUTDATED, MISSING, STALE = "INSTALLED", "OUTDATED", "MISSING", "STALE"


@dataclass(frozen=True)
class Limits:
    """The limits of an installation, in seconds.

    One attempt waits at most ``lock`` for a table (or for one partition of it), and so writers
    queue behind it for no longer. After ``total`` the table is given up.
    """

    lock: float = 0.5
    total: float = 10.0

    def __post_init__(self) -> None:
        for option, seconds in (("lock_timeout", self.lock), ("install_timeout", self.total)):
            # PostgreSQL counts milliseconds in 32 bits, and takes 0 for no limit at all.
            if not isinstance(seconds, int | float) or not 0.001 <= seconds <= 2_000_000:
                raise ConfigurationError(
                    f"{option}={seconds!r}: give seconds, from 0.001 to 2,000,000."
                )


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class State:
    """The state of one trigger; ``detail`` says why.

    INSTALLED: it is as a watcher needs it, or somebody else listens to it. OUTDATED: it is there,
    but not as it should be. MISSING: a watcher needs it. STALE: no watcher needs it, and nobody
    listens to it.

    In WAL delivery ``served`` is what its events are made of, ``"rows"`` of the write-ahead log or
    ``"messages"`` of a trigger, and ``lacking`` why rows would not do, where a watcher is known.
    """

    status: str
    schema: str
    table: str | None
    op: str
    label: str | None
    name: str
    listeners: int = 0
    detail: str = ""
    served: Capture | None = None
    lacking: str = ""


@dataclass
class Plan:
    """The triggers' states, and the statements that would make them what the watchers need."""

    wanted: Sequence[Trigger] = ()
    states: list[State] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)
    created: list[Trigger] = field(default_factory=list)
    unwanted: list[Installed] = field(default_factory=list)


def plan(wanted: Sequence[Trigger], installed: Sequence[Installed]) -> Plan:
    """Compare the triggers that are wanted with those that are installed. Pure."""
    result = Plan(wanted)
    others = {(item.function_schema, item.name): item for item in installed}
    identities = {_identity(item) for item in installed}
    creates: list[str] = []
    for trigger in sorted(wanted, key=_place):
        spec = trigger.spec
        present = others.pop((spec.table.schema, trigger.name), None)
        status, detail = _compare(trigger, present)
        if present is None and (*_place(trigger), spec.op, spec.label) in identities:
            status = OUTDATED
            detail = "installed for another definition of the watcher or of the table"
        result.states.append(
            State(
                status,
                *_place(trigger),
                spec.op,
                spec.label,
                trigger.name,
                present.listeners if present is not None else 0,
                detail,
                _served(spec.transport, spec.rows),
            )
        )
        if status == INSTALLED:
            continue
        if present is not None:
            result.statements += trigger.drop
        creates += trigger.create
        result.created.append(trigger)
    # Dropping comes first, since it takes the stronger lock. Otherwise a lock would be raised to a
    # stronger one, by which two transactions could come to wait for each other.
    result.statements += creates
    for item in others.values():
        result.unwanted.append(item)
        result.states.append(judge(item))
    return result


def judge(item: Installed) -> State:
    """Return the state of a trigger that none of the watchers at hand needs."""
    status, detail = INSTALLED if item.in_use else STALE, ""
    if item.missing_columns:
        detail = f"the table has no column {item.missing_columns[0]!r} any more"
    elif item.main is None:
        detail = "a function without its trigger"
    elif item.copied:
        detail = "it came with a copy of the table, and sends nothing"
    elif item.main.enabled == "D":
        detail = "the trigger is disabled"
    elif not item.able:
        detail = _unable(item)
    if detail and item.in_use:
        status = OUTDATED
    return State(
        status,
        item.schema,
        item.table,
        item.tag.op,
        item.tag.label,
        item.name,
        item.listeners,
        detail,
        _served(item.transport, item.tag.rows),
    )


def _served(transport: Transport, rows: bool) -> Capture | None:
    if transport is not Transport.WAL:
        return None
    return "rows" if rows else "messages"


def _unable(item: Installed) -> str:
    return f"its owner {item.owner!r} lacks rights in the schema pgsignals, with which it writes"


def _compare(trigger: Trigger, present: Installed | None) -> tuple[str, str]:
    if present is None:
        return MISSING, ""
    if present.main is None:
        what = "the table is not published" if trigger.spec.rows else "not the trigger"
        return MISSING, f"its function is there, but {what}"
    if present.copied:
        return MISSING, "the table is a copy of the one that the trigger was made for"
    main, oid = present.main, trigger.spec.table.oid
    if main.oid != oid:
        return MISSING, f"the table that had it is now {main.schema}.{main.table}"
    if present.body != normalized(trigger.body):
        return OUTDATED, "somebody has changed the function"
    fired = {each.oid: each for each in present.fired}
    for relation in trigger.spec.relations:
        where = "" if relation.oid == oid else f" of {relation.schema}.{relation.name}"
        each = fired.get(relation.oid)
        if each is None and trigger.spec.rows:
            return OUTDATED, f"the table{where} is not published any more"
        if each is None:
            return OUTDATED, f"the trigger{where} is missing"
        if each.enabled == "D":
            return OUTDATED, f"the trigger{where} is disabled"
        if not trigger.spec.rows and each.enabled != ("A" if trigger.spec.replicated else "O"):
            return OUTDATED, f"somebody has changed when the trigger{where} fires"
    if present.silent_parts:
        part = present.silent_parts[0]
        return OUTDATED, f"the trigger of the partition {part} is disabled, or fires at other times"
    if not present.able:
        return OUTDATED, _unable(present)
    return INSTALLED, ""


def _place(trigger: Trigger) -> tuple[str, str]:
    return trigger.spec.table.schema, trigger.spec.table.name


def _identity(item: Installed) -> tuple[str, str | None, str, str | None]:
    return item.schema, item.table, item.tag.op, item.tag.label


def install(
    cursor: Cursor, namespace: str, wanted: Sequence[Trigger], limits: Limits = DEFAULT_LIMITS
) -> list[Trigger]:
    """Create the triggers that are missing or outdated; return those that were created.

    Nothing is executed if no trigger differs. See ``create``.
    """
    return create(cursor, namespace, plan(wanted, read_installed(cursor, namespace)), limits)


def create(
    cursor: Cursor, namespace: str, change: Plan, limits: Limits = DEFAULT_LIMITS
) -> list[Trigger]:
    """Create the triggers of a plan that was made a moment ago; return those that were created.

    Each table gets its triggers in a transaction of its own. Otherwise we would hold the lock of
    one table while we wait for that of another, and could be caught in a deadlock with a writer.
    The cursor's connection must be in autocommit mode. Raises PrivilegeError, InstallLockError,
    DatabaseError.
    """
    pending = change.created
    _check_rights(cursor, pending)
    tables = [list(triggers) for _, triggers in groupby(pending, _place)]
    created: list[Trigger] = []
    for number, triggers in enumerate(tables, 1):
        last = number == len(tables)
        created += _install_on_table(cursor, namespace, triggers, limits, last)
    return created


def create_what_can_be(cursor: Cursor, namespace: str, change: Plan, limits: Limits) -> str:
    """Install for a Hub that runs already; a table that fails keeps no other from being installed.

    Return why something is missing still, or an empty text. Each table gets one try, since readers
    queue behind it.
    """
    once = replace(limits, total=limits.lock)
    problems = []
    for _, triggers in groupby(change.created, _place):
        try:
            create(cursor, namespace, Plan(created=list(triggers)), once)
        except DatabaseError as error:
            problems.append(str(error))
    return "; ".join(problems)


def _install_on_table(
    cursor: Cursor, namespace: str, triggers: Sequence[Trigger], limits: Limits, last: bool
) -> list[Trigger]:
    """Create a table's triggers; return those that were created.

    Only the ``last`` table's transaction waits for the disk. Until then a crash of the server may
    undo the others, but also all that was written under their triggers: the log keeps its order.
    """
    named = [trigger.name for trigger in triggers]

    def apply() -> list[Trigger]:
        change = Plan(
            statements=[each for trigger in triggers for each in trigger.create],
            created=list(triggers),
        )
        if _any_exists(cursor, named):
            # Only these: with all, each of many tables would take as long as all together.
            change = plan(triggers, read_installed(cursor, namespace, named))
        for statement in change.statements:
            made = statement.find("CREATE FUNCTION") if statement.startswith("DO ") else -1
            log.debug("installing: %s", statement[max(0, made) :].partition("\n")[0])
        if change.statements:
            before = () if last else ("SET LOCAL synchronous_commit TO off",)
            # All in one message, so that writers wait for no round trips while we hold the lock.
            cursor.execute(";\n".join((*before, *change.statements)))
        return change.created

    created = in_install_lock(cursor, limits, *_place(triggers[0]), apply)
    for trigger in created:
        log.info(
            "installed trigger %s for %s on %s",
            trigger.name,
            trigger.spec.op,
            trigger.spec.table.qualified,
        )
    return created


def _any_exists(cursor: Cursor, named: Sequence[str]) -> bool:
    """Whether there are functions with one of these names, ours or others'."""
    cursor.execute(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_proc WHERE proname = ANY (%s::name[]))",
        (list(named),),
    )
    [(exists,)] = cursor.fetchall()
    return bool(exists)


def _check_rights(cursor: Cursor, triggers: Sequence[Trigger]) -> None:
    """Raise PrivilegeError, with the GRANTs that would help, if the role may not install."""
    fired = [trigger for trigger in triggers if not trigger.spec.rows]
    _check_privileges(cursor, fired)
    _check_owner(cursor, [trigger for trigger in triggers if trigger.spec.rows])
    _check_definer(cursor, [trigger for trigger in fired if trigger.spec.transport.durable])
    for transport in {trigger.spec.transport for trigger in triggers} & _LOG_RIGHTS.keys():
        _check_log_rights(cursor, transport)


def _check_privileges(cursor: Cursor, triggers: Sequence[Trigger]) -> None:
    """Raise PrivilegeError if the role may not create the triggers."""
    relations = {each: None for trigger in triggers for each in trigger.spec.relations}
    homes = {trigger.spec.table.schema: None for trigger in triggers}
    lacks = lacking(
        cursor,
        [
            *(Right("TRIGGER", (each.schema, each.name)) for each in relations),
            *(Right("CREATE", (home,), "SCHEMA") for home in homes),
        ],
    )
    if lacks:
        role = current_role(cursor)
        fix = "; ".join(grants(cursor, role, lacks))
        raise PrivilegeError(
            f"The role {role!r} lacks {' and '.join(map(str, lacks))}, which installing takes. Run "
            '`pgsignals install` as the tables\' owner and start with install="check", or have '
            f"the owner run: {fix}."
        )


def _check_owner(cursor: Cursor, triggers: Sequence[Trigger]) -> None:
    """Raise PrivilegeError if the role does not own the tables to publish: no GRANT gives that."""
    if not triggers:
        return
    cursor.execute(
        "SELECT c.oid::pg_catalog.regclass::text, pg_catalog.pg_get_userbyid(c.relowner)"
        " FROM pg_catalog.pg_class c WHERE c.oid = ANY (%s::pg_catalog.oid[])"
        " AND NOT pg_catalog.pg_has_role(c.relowner, 'USAGE')",
        (sorted({oid for trigger in triggers for oid in trigger.relations}),),
    )
    for table, owner in cursor.fetchall():
        raise PrivilegeError(
            f"The role {current_role(cursor)!r} does not own {table}, whose owner {owner!r} alone "
            "may publish its rows. Run `pgsignals install --delivery wal` as that owner and start "
            'with install="check", or have triggers send messages: capture="messages".'
        )


_Rights = Sequence[tuple[str, ...]]

# The rights that installing for a log takes: the functions write to it with the installer's rights,
# and installing notes their channels and, where a trigger was missing, consumers' losses.
_CHANNEL_RIGHTS: _Rights = (
    ("SCHEMA", "", "USAGE"),
    ("TABLE", "consumers", "SELECT", "UPDATE (lost_until, acknowledged_at)"),
    ("TABLE", "channels", "SELECT", "INSERT", "UPDATE"),
    ("TABLE", "relations", "SELECT", "INSERT", "UPDATE"),
    ("SEQUENCE", "outbox_shed", "UPDATE"),
)
_LOG_RIGHTS: Mapping[Transport, _Rights] = {
    Transport.OUTBOX: (
        ("TABLE", "outbox", "INSERT"),
        ("TABLE", "settings", "SELECT"),
        ("SEQUENCE", "outbox_id", "UPDATE"),
        ("SEQUENCE", "outbox_full", "UPDATE", "SELECT"),
        ("SEQUENCE", "outbox_segment", "SELECT"),
        ("FUNCTION", "has_room", "EXECUTE"),
        ("FUNCTION", "put", "EXECUTE"),
    ),
    Transport.WAL: (("SEQUENCE", "wal_secret", "SELECT"),),
}


def _check_log_rights(cursor: Cursor, transport: Transport) -> None:
    """Raise PrivilegeError, with the GRANTs, if the functions could not write to the log.

    Then no change of the table would reach it.
    """
    wanted = [
        Right(privilege, ("pgsignals", name) if name else ("pgsignals",), kind)
        for kind, name, *privileges in (*_LOG_RIGHTS[transport], *_CHANNEL_RIGHTS)
        for privilege in privileges
    ]
    if lacks := lacking(cursor, wanted):
        role = current_role(cursor)
        fix = "; ".join(grants(cursor, role, lacks))
        raise PrivilegeError(
            f"The role {role!r} lacks rights in the schema pgsignals, with which the triggers "
            f"would write. Have the owner of the schema pgsignals run: {fix}."
        )


def _check_definer(cursor: Cursor, triggers: Sequence[Trigger]) -> None:
    """Raise PrivilegeError if the table's owner could run code of its own as a superuser.

    Functions that write to a log run with the installer's rights, on values of the table's
    columns. The table's owner can change a column to a type of its own, whose casts would then run
    with those rights.
    """
    tables = {trigger.spec.table.oid: trigger.spec.table.qualified for trigger in triggers}
    if not tables:
        return
    cursor.execute(
        "SELECT c.oid, pg_catalog.pg_get_userbyid(c.relowner), current_user, r.rolsuper,"
        " pg_catalog.pg_has_role(c.relowner, r.oid, 'MEMBER')"
        " FROM pg_catalog.pg_class c, pg_catalog.pg_roles r"
        " WHERE c.oid = ANY (%s::pg_catalog.oid[]) AND r.rolname = current_user",
        (list(tables),),
    )
    found = {oid: row for oid, *row in cursor.fetchall()}
    for oid, table in tables.items():
        if oid not in found:
            raise _gone(table, "there is no such table any more")
        owner, role, superuser, trusted = found[oid]
        if trusted:
            continue
        if superuser:
            raise PrivilegeError(
                f"The triggers on {table} would write with the rights of the superuser {role!r}, "
                f"which the table's owner {owner!r} could make use of. Install them as that owner: "
                f"add options=-crole%3D{owner} to the connection's URL, and give it what "
                "docs/outbox.md says of installing, under Privileges."
            )
        log.warning(
            "the triggers on %s write with the rights of the role %r, which the "
            "table's owner %r could make use of: better install them as that",
            table,
            role,
            owner,
        )


def check(change: Plan) -> None:
    """Raise DriftError, which says what to run, unless everything wanted is installed."""
    needed = {trigger.name for trigger in change.wanted}
    lines = [
        f"  {state.status} {state.op} on {state.schema}.{state.table}"
        + (f" (label {state.label!r})" if state.label is not None else "")
        + (f": {state.detail}" if state.detail else "")
        for state in change.states
        # Triggers that only others need are for others to install.
        if state.name in needed and state.status in (MISSING, OUTDATED)
    ]
    if lines:
        raise DriftError(
            'install="check" found triggers that are not as the watchers need them:\n'
            + "\n".join(lines)
            + "\nAs the tables' owner, run `pgsignals install` with these watchers, or apply what "
            "`pgsignals sql` prints."
        )


@dataclass(frozen=True)
class Drift:
    """The ``reason`` why triggers are not as the watchers need them.

    ``moved``: the watchers need other triggers than those that are listened to, so that the source
    has to connect again; otherwise the same ones have to be installed again. Unless the watcher
    ``fits`` its table, no trigger could be installed that would do.
    """

    reason: str
    moved: bool = False
    fits: bool = True


def find_drift(former: Sequence[Trigger], change: Plan, may_install: bool) -> Drift | None:
    """Return why the triggers listened to, ``former``, are not what the watchers need by now.

    None if they are.
    """
    known = {(trigger.name, trigger.relations) for trigger in former}
    moved = [each for each in change.wanted if (each.name, each.relations) not in known]
    needed = {trigger.name for trigger in change.wanted}
    lacking = [
        f"the trigger for {state.op} on {state.schema}.{state.table}: {state.detail or 'missing'}"
        for state in change.states
        if state.name in needed and state.status != INSTALLED
    ]
    # If somebody else has to install the new ones, the source goes on with the former until then.
    if moved and (may_install or not lacking):
        table = moved[0].spec.table.qualified
        return Drift(f"{table} is another table, or has other relatives, than before", True)
    # Triggers that have moved, and that we may not install, are among the lacking ones.
    return Drift(lacking[0]) if lacking else None


def prune(
    cursor: Cursor,
    namespace: str,
    keep: Sequence[Trigger] = (),
    *,
    only: Sequence[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> list[Installed]:
    """Remove triggers of the namespace that are not in ``keep`` and that nobody needs.

    ``only`` restricts the removal to these names. See ``remove``.
    """
    unwanted = plan(keep, read_installed(cursor, namespace)).unwanted
    return remove(cursor, [item for item in unwanted if only is None or item.name in only], limits)


def remove(cursor: Cursor, unwanted: Sequence[Installed], limits: Limits) -> list[Installed]:
    """Remove those of the triggers that nobody needs, as they were read a moment ago.

    A listener needs its triggers, and so does a durable consumer, whether it runs or not. A trigger
    that cannot be removed now, because its table is locked or belongs to another role, is left and
    logged: it costs writers little, and a later start tries again.
    """
    removed = []
    for item in unwanted:
        if item.in_use:
            continue
        try:
            with transaction(cursor, [_lock_timeout(limits.lock)]):
                if not _claim(cursor, item):
                    continue
                cursor.execute(drop_statement(item.function_schema, item.name))
        except psycopg2.Error as error:
            if cursor.connection.closed:
                raise
            log.warning("left the stale trigger %s: %s", item.name, str(error).strip())
            continue
        log.info("removed the stale trigger %s of %s.%s", item.name, item.schema, item.table)
        removed.append(item)
    if any(item.tag.rows for item in removed):
        try:
            tidy_publications(cursor, replace(limits, total=limits.lock))
        except DatabaseError as error:
            log.warning("left a table in a publication that nobody needs there: %s", error)
    return removed


def uninstall(
    cursor: Cursor, namespace: str, *, force: bool = False, limits: Limits = DEFAULT_LIMITS
) -> list[Installed]:
    """Remove every trigger of the namespace; return those that were removed.

    Raises DatabaseError when somebody listens, unless ``force``; PrivilegeError, InstallLockError.
    """
    installed = read_installed(cursor, namespace)

    def remove(item: Installed) -> None:
        if not _claim(cursor, item) and not force:
            raise _in_use(namespace, item)
        cursor.execute(drop_statement(item.function_schema, item.name))

    for item in installed:
        if item.in_use and not force:
            raise _in_use(namespace, item)
    for item in installed:
        in_install_lock(cursor, limits, item.schema, item.table, partial(remove, item))
        log.info("removed the trigger %s of %s.%s", item.name, item.schema, item.table)
    if any(item.transport is Transport.WAL for item in installed):
        tidy_publications(cursor, limits, whole=True)
    return installed


def tidy_publications(
    cursor: Cursor, limits: Limits = DEFAULT_LIMITS, *, whole: bool = False
) -> None:
    """Take the tables out of our publications that no watcher of any namespace needs there.

    With ``whole``, drop the publications, too, where nobody reads through them any more. Raises
    PrivilegeError for a role that does not own them, InstallLockError.
    """
    if publications.left_over(cursor) or (whole and publications.unused(cursor)):
        statement = publications.tidying(whole=whole)
        in_install_lock(cursor, limits, "pgsignals", None, lambda: cursor.execute(statement))
        log.info("tidied the publications")


def _claim(cursor: Cursor, item: Installed) -> bool:
    """Whether nobody listens, or can begin to before the transaction ends.

    A listener that starts takes its own lock first, then waits for this one, and only then looks
    for the trigger. So it either keeps us from removing the trigger, or finds it gone.
    """
    cursor.execute(
        "SELECT pg_catalog.pg_advisory_xact_lock(%s, %s)", (names.LOCK_CLASS, names.REMOVAL_LOCK)
    )
    return item.copied or not any(names.listens(keys, item.hash) for keys in read_listeners(cursor))


def _in_use(namespace: str, item: Installed) -> DatabaseError:
    if item.consumed and not item.listeners:
        return DatabaseError(
            f"A consumer reads {item.tag.op} of {item.schema}.{item.table} in the "
            f"namespace {namespace!r}, and would hear nothing any more. See `pgsignals consumers "
            "list`, drop it if nobody needs it, or force it."
        )
    return DatabaseError(
        f"A listener needs {item.tag.op} on {item.schema}.{item.table} in the namespace "
        f"{namespace!r}, and would hear nothing any more. Stop it first, or force it."
    )


def in_install_lock(
    cursor: Cursor, limits: Limits, schema: str, table: str | None, apply: Callable[[], T]
) -> T:
    """Run ``apply`` in a transaction that holds the install lock; try until it gets all locks.

    Each try gives up after ``limits.lock``, and pauses, so that writers never queue behind us for
    longer.
    """
    place = schema if table is None else f"{schema}.{table}"
    began = time.monotonic()
    deadline = began + limits.total
    attempt = 0
    while True:
        attempt += 1
        try:
            # This lock may be waited for longer: only other installers queue behind it.
            patience = max(deadline - time.monotonic(), limits.lock)
            opening = [_lock_timeout(patience), names.INSTALL_LOCKING, _lock_timeout(limits.lock)]
            with transaction(cursor, opening):
                return apply()
        except (pg.LockNotAvailable, pg.DeadlockDetected) as error:
            pause = chance.uniform(0.5, 1.5) * limits.lock
            if time.monotonic() + pause >= deadline:
                raise InstallLockError(
                    f"{f'The schema {schema}' if table is None else f'The triggers of {place}'} "
                    f"could not be changed within "
                    f"{time.monotonic() - began:.1f} s, in {attempt} tries that waited "
                    f"{limits.lock:g} s each: {error.diag.message_primary}."
                    f"{lock_holders(cursor, schema, table)} Try again when that has ended, or "
                    "allow more time with install_timeout=."
                ) from error
            log.info("%s is locked; trying again in %.1f s", place, pause)
            time.sleep(pause)
        except pg.InsufficientPrivilege as error:
            raise PrivilegeError(
                f"{place}: {error.diag.message_primary}. Run `pgsignals install` as that "
                'owner, and start with install="check".'
            ) from error
        except (pg.UndefinedTable, pg.InvalidSchemaName) as error:
            raise _gone(place, error.diag.message_primary) from error
        except (pg.DuplicateObject, pg.DuplicateFunction) as error:
            raise DatabaseError(
                f"{error.diag.message_primary}, and it is not ours: its function carries no "
                "pgsignals comment, so it is left alone. Rename or drop it, or use another "
                "namespace=."
            ) from error


def _gone(place: str, reason: str | None) -> DatabaseError:
    """Return the error for a table that was resolved a moment ago, and is another or none now."""
    return DatabaseError(
        f"{place} was renamed or dropped while its triggers were installed: {reason}. Try again."
    )


_HOLDERS = """
SELECT l.pid, coalesce(nullif(a.application_name, ''), a.backend_type, 'unnamed'),
       coalesce(a.state, 'active'),
       extract(epoch FROM pg_catalog.clock_timestamp() - a.xact_start)::int
FROM pg_catalog.pg_locks l
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE l.granted AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_catalog.pg_database
                    WHERE datname = pg_catalog.current_database())
  AND (l.relation IN (SELECT %(table)s::regclass
                      UNION SELECT relid FROM pg_catalog.pg_partition_tree(%(table)s::regclass)
                      UNION SELECT oid FROM pg_catalog.pg_class WHERE %(table)s IS NULL
                        AND relnamespace = pg_catalog.to_regnamespace('pgsignals'))
       OR (l.locktype = 'advisory' AND l.mode = 'ExclusiveLock' AND l.objsubid = 2
           AND l.classid = %(class)s AND l.objid = %(install)s))
GROUP BY 1, 2, 3, 4
ORDER BY bool_and(l.mode IN ('AccessShareLock', 'RowShareLock')), 4 DESC NULLS LAST
LIMIT 3
"""


def lock_holders(cursor: Cursor, schema: str, table: str | None) -> str:
    """Return a sentence on who holds locks of the ``table``; empty if nobody does any more.

    Without a table, the locks are those of the outbox. Writers and installers come first: they are
    in the way of a new trigger, readers only of replacing one.
    """
    named = None
    if table is not None:
        named = sql.Identifier(schema, table).as_string(cursor)
    cursor.execute(
        _HOLDERS, {"table": named, "class": names.LOCK_CLASS, "install": names.INSTALL_LOCK}
    )
    found = [
        "a prepared transaction"
        if pid is None
        else f"pid {pid} ({name}, {state}" + (f", for {age} s)" if age is not None else ")")
        for pid, name, state, age in cursor.fetchall()
    ]
    return f" Locks are held by {', '.join(found)}." if found else ""


def _lock_timeout(seconds: float) -> str:
    """Return the statement that bounds the transaction's waits for locks."""
    return f"SET LOCAL lock_timeout TO '{int(seconds * 1000)}ms'"
