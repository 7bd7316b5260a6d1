"""What a role or a database may set for all its sessions, and what ours have in its place.

For how long ours wait we say ourselves, by the client's clock: a timeout that is meant for an
application's queries would end a session that listens, and an installation that waits for a lock.
Only a process that hangs within a transaction, whose locks others wait for, is the server's to end.
"""

from __future__ import annotations

import psycopg2

# Since which version of PostgreSQL there is one.
_TRANSACTION = (
    (0, "statement_timeout", "0"),
    (0, "lock_timeout", "0"),
    (0, "idle_in_transaction_session_timeout", "60s"),
    (170000, "transaction_timeout", "0"),
)
# When the other end is gone without a word, the server ends the session, and with it its locks,
# after about a minute.
_SESSION = (
    *_TRANSACTION,
    (0, "idle_session_timeout", "0"),
    (0, "default_transaction_isolation", "read committed"),
    (0, "tcp_keepalives_idle", "30"),
    (0, "tcp_keepalives_interval", "10"),
    (0, "tcp_keepalives_count", "3"),
    (0, "tcp_user_timeout", "60000"),
)


def session_settings(version: int) -> str:
    """The statements after which a session is kept for as long as we want.

    Only for one that is ours alone: behind a pooler of transactions they would stay, for others.
    """
    return "; ".join(
        f"SET SESSION {name} TO '{value}'" for since, name, value in _SESSION if version >= since
    )


def preamble(version: int) -> str:
    """What a transaction begins with where a pooler may give its session to others afterwards."""
    return "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; " + "".join(
        f"SET LOCAL {name} TO '{value}'; "
        for since, name, value in _TRANSACTION
        if version >= since
    )


def error_position(error: psycopg2.Error) -> int | None:
    """Which character of a statement PostgreSQL found wrong, counted from 1, if it says so."""
    if error.diag.statement_position is None:
        return None
    # PostgreSQL counts from where the message begins.
    return int(error.diag.statement_position) - getattr(error.cursor, "preamble_length", 0)
