"""What sources that read from PostgreSQL make sure of when they connect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from psycopg2 import errors as pg
from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..connection import Session, display
from ..errors import ConnectError
from ..triggers import names
from ..triggers.definitions import Definition

IN_RECOVERY = "SELECT pg_catalog.pg_is_in_recovery()"


def listen_to(channel: str) -> sql.Composed:
    """The statement that listens to a channel."""
    return sql.SQL("LISTEN {}").format(sql.Identifier(channel))


def refuse_standby(dsn: str, answer: Sequence[tuple[bool]]) -> None:
    """Raise ConnectError where the ``answer`` to IN_RECOVERY says that there is no LISTEN."""
    [(standby,)] = answer
    if standby:
        raise ConnectError(
            f"The server at {display(dsn)} is a standby, where LISTEN is not possible. Connect to "
            "the primary: target_session_attrs=read-write in the DSN picks it among several hosts."
        )


@contextmanager
def explaining_read_only(dsn: str) -> Iterator[None]:
    """Raise ConnectError with the fix where nothing may be written."""
    try:
        yield
    except pg.ReadOnlySqlTransaction as error:
        raise ConnectError(
            f"Transactions are read-only at {display(dsn)}, so that the triggers cannot "
            "be installed. Set default_transaction_read_only to off for this role or "
            "database, or have `pgsignals install` run by a role that may write and start "
            'with install="check".'
        ) from error


def keep_triggers(session: Session, definitions: Sequence[Definition], timeout: float) -> None:
    """Hold the locks by which others see that these triggers are needed.

    To be called before looking whether the triggers are there: whoever prunes takes these locks, so
    that from here on nobody removes what we are about to rely on.
    """
    session.execute(
        "SELECT pg_catalog.pg_advisory_lock_shared(%s, key)"
        " FROM pg_catalog.unnest(%s::int[]) AS key",
        (names.LOCK_CLASS, [d.trigger.lock_key for d in definitions]),
        timeout=timeout,
    )


def prove_round_trip(
    session: Session,
    cursor: Cursor,
    dsn: str,
    channel: str,
    timeout: float,
    cancelled: Callable[[], bool],
) -> None:
    """Raise ConnectError unless a notification comes from ``cursor``'s session to ``session``.

    Behind a pooler that pools transactions, LISTEN succeeds and nothing ever arrives. The
    notification comes from the other connection: what a session says to itself may come back even
    there, within the answer.
    """
    session.execute(listen_to(channel), timeout=timeout)
    [(ours,)] = session.execute("SELECT pg_catalog.pg_backend_pid()", timeout=timeout)
    cursor.execute("SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_notify(%s, '')", (channel,))
    [(others, _)] = cursor.fetchall()
    deadline = time.monotonic() + timeout
    while not any(notify.channel == channel for notify in session.receive()):
        # Two connections with one backend: no need to wait for what will not come.
        if others == ours or time.monotonic() >= deadline or cancelled():
            raise ConnectError(
                f"At {display(dsn)} LISTEN succeeds, but no notification arrives "
                f"(within {timeout:g} s). PgBouncer with pool_mode=transaction (or statement) "
                "does that: keep the pooled DSN, and give a direct one to listen on with "
                "listen_dsn=. Both must lead to the same database of the same server."
            )
        session.wait(deadline - time.monotonic())
