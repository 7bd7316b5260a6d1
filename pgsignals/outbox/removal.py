"""Removes the outbox from a database."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from psycopg2.extensions import cursor as Cursor

from ..consumers.slot_states import drop_slots, read_slots
from ..core.errors import DatabaseError
from ..core.logging import log
from ..core.transport import Transport
from ..triggers.catalogue import Installed, read_installed
from ..triggers.installer import DEFAULT_LIMITS, Limits, in_install_lock, tidy_publications
from ..triggers.sql import drop_statement
from .inspection import read_outbox
from .schema import NAME, find_schema, live_readers


@dataclass(frozen=True)
class Survey:
    """All that would be lost: named consumers with their lag in events, dead letters, triggers.

    The first two are None in a schema of a version that this program cannot work with.
    """

    consumers: tuple[tuple[str, int], ...] | None
    dead_letters: int | None
    triggers: tuple[Installed, ...]


def survey(cursor: Cursor) -> Survey:
    """Survey the outbox. Raises DatabaseError without one, or while a process reads it."""
    _check_idle(cursor)
    if not _is_known(cursor):
        return Survey(None, None, tuple(_triggers(cursor)))
    lags: dict[str, int] = {}
    for each in read_outbox(cursor).consumers:
        if not each.ephemeral:
            # Each partition counts the events of all, so that their sum would count them twice.
            lags[each.name] = max(lags.get(each.name, 0), each.lag)
    cursor.execute("SELECT pg_catalog.count(*) FROM pgsignals.dead_letters")
    [(letters,)] = cursor.fetchall()
    return Survey(tuple(lags.items()), letters, tuple(_triggers(cursor)))


def remove(cursor: Cursor, limits: Limits = DEFAULT_LIMITS) -> list[Installed]:
    """Remove the triggers of durable delivery, then its schema; return those triggers.

    The slots of consumers of the write-ahead log go, too, and then the publications. Raises
    DatabaseError while a process reads for a consumer; PrivilegeError, InstallLockError.
    """

    def drop_trigger(item: Installed) -> None:
        cursor.execute(drop_statement(item.function_schema, item.name))

    def drop_schema() -> None:
        # From here on no process can become a consumer; otherwise one could between check and drop.
        cursor.execute("LOCK TABLE pgsignals.consumers IN ACCESS EXCLUSIVE MODE")
        _check_idle(cursor)
        cursor.execute("DROP SCHEMA pgsignals CASCADE")

    _check_idle(cursor)
    removed = _triggers(cursor)
    for item in removed:
        in_install_lock(cursor, limits, item.schema, item.table, partial(drop_trigger, item))
    in_install_lock(cursor, limits, NAME, None, drop_schema)
    drop_slots(cursor, read_slots(cursor))
    if any(item.transport is Transport.WAL for item in removed):
        tidy_publications(cursor, limits, whole=True)
    log.info("removed the schema %s and %d triggers", NAME, len(removed))
    return removed


def _triggers(cursor: Cursor) -> list[Installed]:
    return [item for item in read_installed(cursor, None) if item.transport.durable]


def _is_known(cursor: Cursor) -> bool:
    found = find_schema(cursor)
    if found is None:
        raise DatabaseError(f"There is no outbox in this database: no schema {NAME!r}.")
    return found.usable


def _check_idle(cursor: Cursor) -> None:
    if not _is_known(cursor):
        if readers := live_readers(cursor):
            raise DatabaseError(
                f"Programs read the outbox in {readers} of the sessions, and would hear nothing "
                "any more. Stop them first."
            )
        return
    active = {each.name: each.holder for each in read_outbox(cursor).consumers if each.active}
    if active:
        named = ", ".join(f"{name!r} ({holder})" for name, holder in active.items())
        raise DatabaseError(
            f"Processes read the outbox, and would hear nothing any more: {named}. Stop them first."
        )
    for item in _triggers(cursor):
        if item.listeners:
            raise DatabaseError(
                f"A process stands by to read {item.tag.op} of {item.schema}.{item.table} from the "
                "outbox. Stop it first."
            )
