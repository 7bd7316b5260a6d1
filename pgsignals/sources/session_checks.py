"""The checks that sources which read from PostgreSQL make when they connect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime

from psycopg2 import InterfaceError, OperationalError, sql
from psycopg2 import errors as pg
from psycopg2.extensions import cursor as Cursor

from ..core.errors import ConnectError, PrivilegeError
from ..postgres.connection import connect
from ..postgres.dsn import display
from ..postgres.session import Session
from ..triggers import names
from ..triggers.definitions import Definition

IN_RECOVERY = "SELECT pg_catalog.pg_is_in_recovery()"


def listen_to(*channels: str) -> sql.Composed:
    """Return the statements that listen to channels."""
    return sql.SQL("; ").join(
        sql.SQL("LISTEN {}").format(sql.Identifier(channel)) for channel in channels
    )


def server_time(cursor: Cursor) -> datetime:
    """Ask the server for its time."""
    cursor.execute("SELECT pg_catalog.clock_timestamp()")
    [(now,)] = cursor.fetchall()
    assert isinstance(now, datetime)
    return now


def refuse_standby(dsn: str, answer: Sequence[tuple[bool]]) -> None:
    """Raise ConnectError if the ``answer`` to IN_RECOVERY is a standby's, which has no LISTEN."""
    [(standby,)] = answer
    if standby:
        raise ConnectError(
            f"The server at {display(dsn)} is a standby, where LISTEN is not possible. Connect to "
            "the primary: target_session_attrs=read-write in the DSN picks it among several hosts."
        )


@contextmanager
def explaining_read_only(dsn: str) -> Iterator[None]:
    """Raise ConnectError with the fix if transactions are read-only."""
    try:
        yield
    except pg.ReadOnlySqlTransaction as error:
        raise ConnectError(
            f"Transactions are read-only at {display(dsn)}, so that the triggers cannot "
            "be installed. Set default_transaction_read_only to off for this role or "
            "database, or have `pgsignals install` run by a role that may write and start "
            'with install="check".'
        ) from error


@contextmanager
def explaining_missing_rights(
    dsn: str, listen_dsn: str, missing_grants: Callable[[Cursor], list[str]]
) -> Iterator[None]:
    """Raise PrivilegeError with the fix, the ``missing_grants``, if the role may not read."""
    try:
        yield
    except pg.InsufficientPrivilege as error:
        grants: list[str] = []
        # The error to raise is about the privilege, also if the server goes away meanwhile.
        with (
            suppress(OperationalError, InterfaceError),
            closing(connect(listen_dsn)) as connection,
            connection.cursor() as cursor,
        ):
            grants = missing_grants(cursor)
        if not grants:
            raise PrivilegeError(
                f"At {display(dsn)} this role lacks a right that installing and reading events "
                f"take: {error.diag.message_primary}. docs/outbox.md and docs/wal.md list them, "
                "under Privileges."
            ) from error
        raise PrivilegeError(
            f"At {display(listen_dsn)} this role cannot be a consumer: "
            f"{error.diag.message_primary}. Have the owner of the schema 'pgsignals' (for "
            f"ALTER ROLE, a superuser) run: {'; '.join(grants)}."
        ) from error


def keep_triggers(session: Session, definitions: Sequence[Definition], timeout: float) -> None:
    """Hold the locks by which others see that these triggers are needed.

    Call it before looking whether the triggers are there: from here on no process begins to remove
    triggers that we are about to rely on, and every removal that had begun has ended.
    """
    session.execute(
        "SELECT pg_catalog.pg_advisory_lock_shared(%s, key)"
        " FROM pg_catalog.unnest(%s::int[]) AS key",
        (names.LISTENER_CLASS, names.listener_keys(d.trigger.hash for d in definitions)),
        timeout=timeout,
    )
    session.execute(
        "SELECT pg_catalog.pg_advisory_xact_lock_shared(%s, %s)",
        (names.LOCK_CLASS, names.REMOVAL_LOCK),
        timeout=timeout,
    )


def queue_is_full(cursor: Cursor) -> bool:
    """Whether the queue is so full, since some listener does not read, that NOTIFY could fail."""
    cursor.execute("SELECT pg_catalog.pg_notification_queue_usage()")
    [(usage,)] = cursor.fetchall()
    return bool(usage >= names.QUEUE_LIMIT)
