"""Makes the database have the triggers that the watchers need, and no others of ours."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import psycopg2
from psycopg2 import errors as pg
from psycopg2.extensions import cursor as Cursor

from ..errors import DatabaseError, DriftError, InstallLockError, PrivilegeError
from . import names
from .catalogue import Installed, read_installed
from .sql import Trigger, drop_statements

log = logging.getLogger("pgsignals")

T = TypeVar("T")

INSTALLED, OUTDATED, MISSING, STALE = "INSTALLED", "OUTDATED", "MISSING", "STALE"


@dataclass(frozen=True)
class Limits:
    """How long installing may take, in seconds.

    ``lock``: how long one attempt waits for a table, and so how long writers may queue behind it.
    ``total``: when to give up.
    """

    lock: float = 0.5
    total: float = 10.0


@dataclass(frozen=True)
class State:
    """How one trigger stands. ``detail`` says why it is OUTDATED."""

    status: str
    schema: str
    table: str | None
    op: str
    label: str | None
    name: str
    listeners: int = 0
    detail: str = ""


@dataclass
class Plan:
    """What differs from what the watchers need, and the statements that would mend it."""

    states: list[State] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)
    created: list[Trigger] = field(default_factory=list)
    stale: list[Installed] = field(default_factory=list)


def plan(wanted: Sequence[Trigger], installed: Sequence[Installed]) -> Plan:
    """Compare. Pure: it looks at nothing but its arguments."""
    result = Plan()
    by_name = {(item.schema, item.table, item.name): item for item in installed}
    by_identity = {_identity(item): item for item in installed}
    known = set()
    # In the order of their tables, so that two installers cannot wait for each other's locks.
    ordered = sorted(wanted, key=lambda t: (t.spec.table.schema, t.spec.table.name, t.name))
    for trigger in ordered:
        spec = trigger.spec
        place = (spec.table.schema, spec.table.name, trigger.name)
        present = by_name.get(place)
        orphan = by_name.get((spec.table.schema, None, trigger.name))
        known.update((place, (spec.table.schema, None, trigger.name)))
        detail = ""
        if present is None:
            former = by_identity.get(
                (spec.table.schema, spec.table.name, spec.op, spec.label)
            )
            status = MISSING if former is None else OUTDATED
            if former is not None:
                detail = "installed for another definition of the watcher or of the table"
        elif present.enabled != ("A" if spec.replicated else "O"):
            status, detail = OUTDATED, "the trigger is disabled"
        elif present.body != trigger.body:
            status, detail = OUTDATED, "somebody has changed the function"
        else:
            status = INSTALLED
        result.states.append(
            State(
                status,
                spec.table.schema,
                spec.table.name,
                spec.op,
                spec.label,
                trigger.name,
                present.listeners if present is not None else 0,
                detail,
            )
        )
        if status == INSTALLED:
            continue
        if present is not None:
            result.statements += trigger.drop
        elif orphan is not None:
            result.statements += trigger.drop[-1:]
        result.statements += trigger.create
        result.created.append(trigger)
    for place, item in by_name.items():
        if place not in known:
            result.stale.append(item)
            result.states.append(_stale_state(item))
    return result


def _identity(item: Installed) -> tuple[str, str | None, str, str | None]:
    return item.schema, item.table, item.tag.op, item.tag.label


def _stale_state(item: Installed) -> State:
    detail = f"no column {item.missing_columns[0]!r} any more" if item.missing_columns else ""
    return State(
        STALE, item.schema, item.table, item.tag.op, item.tag.label, item.name, item.listeners,
        detail,
    )


def install(
    cursor: Cursor, namespace: str, wanted: Sequence[Trigger], limits: Limits = Limits()
) -> list[Trigger]:
    """Create what is missing or outdated; returns what was created.

    Runs no DDL at all when nothing differs. The cursor's connection is in autocommit mode.
    Raises PrivilegeError, InstallLockError, DatabaseError.
    """
    if not plan(wanted, read_installed(cursor, namespace)).statements:
        return []

    def apply() -> list[Trigger]:
        change = plan(wanted, read_installed(cursor, namespace))
        for statement in change.statements:
            log.debug("install: %s", statement.partition("\n")[0])
            cursor.execute(statement)
        return change.created

    created = _locked(cursor, limits, apply)
    for trigger in created:
        log.info(
            "installed trigger %s for %s on %s",
            trigger.name, trigger.spec.op, trigger.spec.table.qualified,
        )
    return created


def check(cursor: Cursor, namespace: str, wanted: Sequence[Trigger]) -> None:
    """Raise DriftError, which says what to run, unless everything wanted is installed."""
    change = plan(wanted, read_installed(cursor, namespace))
    lines = [
        f"  {state.status} {state.op} on {state.schema}.{state.table}"
        + (f" (label {state.label!r})" if state.label is not None else "")
        + (f": {state.detail}" if state.detail else "")
        for state in change.states
        if state.status in (MISSING, OUTDATED)
    ]
    if lines:
        raise DriftError(
            'install="check" found triggers that are not as the watchers need them:\n'
            + "\n".join(lines)
            + "\nAs the tables' owner, run `pgsignals install` with these watchers, or apply what "
            "`pgsignals sql` prints."
        )


def prune(
    cursor: Cursor,
    namespace: str,
    keep: Sequence[Trigger] = (),
    *,
    only: Sequence[str] | None = None,
    limits: Limits = Limits(),
) -> list[Installed]:
    """Remove triggers of the namespace that are not in ``keep`` and that nobody listens to.

    ``only`` narrows it to these names. What cannot be removed now, because it is locked or belongs
    to another role, is left and logged: it costs writers little and a later start tries again.
    """
    removed = []
    for item in plan(keep, read_installed(cursor, namespace)).stale:
        if item.listeners or (only is not None and item.name not in only):
            continue
        try:
            with _transaction(cursor):
                _set_lock_timeout(cursor, limits.lock)
                # Whoever starts with this trigger takes the lock first, then looks for it.
                cursor.execute(
                    "SELECT pg_catalog.pg_try_advisory_xact_lock(%s, %s)",
                    (names.LOCK_CLASS, names.lock_key(item.hash)),
                )
                row = cursor.fetchone()
                if row is None or not row[0]:
                    continue
                for statement in drop_statements(cursor, item.schema, item.table, item.name):
                    cursor.execute(statement)
        except psycopg2.Error as error:
            if cursor.connection.closed:
                raise
            log.info("left the stale trigger %s: %s", item.name, str(error).strip())
            continue
        log.info("removed stale trigger %s on %s.%s", item.name, item.schema, item.table)
        removed.append(item)
    return removed


def uninstall(
    cursor: Cursor, namespace: str, *, force: bool = False, limits: Limits = Limits()
) -> list[Installed]:
    """Remove every trigger of the namespace; returns what was removed.

    Raises DatabaseError when somebody listens, unless ``force``.
    """

    def apply() -> list[Installed]:
        installed = read_installed(cursor, namespace)
        live = [item for item in installed if item.listeners]
        if live and not force:
            raise DatabaseError(
                f"{live[0].listeners} listener(s) use the triggers of namespace {namespace!r}, "
                f"{live[0].tag.op} on {live[0].schema}.{live[0].table} among them, and would hear "
                "nothing any more. Stop them first, or force it."
            )
        for item in installed:
            for statement in drop_statements(cursor, item.schema, item.table, item.name):
                cursor.execute(statement)
        return installed

    return _locked(cursor, limits, apply)


def _locked(cursor: Cursor, limits: Limits, apply: Callable[[], T]) -> T:
    """Run ``apply`` in a transaction that holds the install lock, trying until it gets all locks.

    Each try gives up its locks after ``limits.lock`` and pauses, so that writers are never queued
    behind us for longer.
    """
    deadline = time.monotonic() + limits.total
    attempt = 0
    while True:
        attempt += 1
        try:
            with _transaction(cursor):
                # Nobody but other installers waits behind this lock.
                _set_lock_timeout(cursor, max(deadline - time.monotonic(), limits.lock))
                cursor.execute(
                    "SELECT pg_catalog.pg_advisory_xact_lock(%s, %s)",
                    (names.LOCK_CLASS, names.INSTALL_LOCK),
                )
                _set_lock_timeout(cursor, limits.lock)
                return apply()
        except (pg.LockNotAvailable, pg.DeadlockDetected) as error:
            pause = random.uniform(0.5, 1.5) * limits.lock
            if time.monotonic() + pause >= deadline:
                raise InstallLockError(
                    f"Installing triggers gave up after {limits.total:g} s and {attempt} tries of "
                    f"{limits.lock:g} s: {error.diag.message_primary}.{_holders(cursor)} "
                    "Try again when that transaction has ended, or allow more time with "
                    "install_timeout=."
                ) from error
            log.info("a table is locked; trying again in %.1f s", pause)
            time.sleep(pause)
        except pg.InsufficientPrivilege as error:
            raise PrivilegeError(
                f"{error.diag.message_primary}. Installing needs TRIGGER on the watched tables "
                "and CREATE on their schemas: run `pgsignals install` as the tables' owner and "
                'start with install="check", or GRANT them.'
            ) from error
        except (pg.DuplicateObject, pg.DuplicateFunction) as error:
            raise DatabaseError(
                f"{error.diag.message_primary}, and it is not ours: it carries no pgsignals "
                "comment, so it is left alone. Rename or drop it, or use another namespace=."
            ) from error


def _holders(cursor: Cursor) -> str:
    """Who else is in a transaction, the oldest first, for the message; empty if nobody is."""
    cursor.execute(
        "SELECT pid, coalesce(nullif(application_name, ''), 'unnamed'), state,"
        " extract(epoch FROM pg_catalog.clock_timestamp() - xact_start)::int"
        " FROM pg_catalog.pg_stat_activity"
        " WHERE datname = pg_catalog.current_database() AND xact_start IS NOT NULL"
        " AND pid <> pg_catalog.pg_backend_pid() AND backend_type = 'client backend'"
        " ORDER BY xact_start LIMIT 3"
    )
    found = [
        f"pid {pid} ({name}, {state}, for {age} s)" for pid, name, state, age in cursor.fetchall()
    ]
    return f" Open transactions: {', '.join(found)}." if found else ""


def _set_lock_timeout(cursor: Cursor, seconds: float) -> None:
    cursor.execute(
        "SELECT pg_catalog.set_config('lock_timeout', %s, true)", (f"{int(seconds * 1000)}ms",)
    )


@contextmanager
def _transaction(cursor: Cursor) -> Iterator[None]:
    """A transaction on an autocommit connection."""
    cursor.execute("BEGIN")
    try:
        yield
    except BaseException:
        if not cursor.connection.closed:
            cursor.execute("ROLLBACK")
        raise
    cursor.execute("COMMIT")
