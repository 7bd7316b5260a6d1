"""The settings of our sessions, in place of those that a role or a database has for all sessions.

Our sessions bound their waits themselves, by the client's clock: a timeout that is meant for an
application's queries would end a session that listens, or an installation that waits for a lock.
Only a transaction whose process hangs is left to the server to end, since others may wait for its
locks. Nor are our questions to the catalogue compiled.
"""

from __future__ import annotations

import psycopg2

# Each setting with the version of PostgreSQL that has it first.
_TRANSACTION = (
    (0, "statement_timeout", "0"),
    (0, "lock_timeout", "0"),
    (0, "idle_in_transaction_session_timeout", "60s"),
    (170000, "transaction_timeout", "0"),
    # The planner expects many more partitions than there are, and would compile for a second what
    # then takes milliseconds.
    (0, "jit", "off"),
    # psycopg2 writes a list of None as '{NULL}', which would be a list of texts.
    (0, "array_nulls", "on"),
)
# With these, the server ends a session, and with it its locks, about a minute after the other end
# has gone without a word.
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
    """Return the statements after which the server keeps a session for as long as we want.

    Only for a session that is ours alone: behind a pooler of transactions, the settings would stay
    for others.
    """
    return "; ".join(
        f"SET SESSION {name} TO '{value}'" for since, name, value in _SESSION if version >= since
    )


def preamble(version: int) -> str:
    """Return the statements that begin a transaction, whose session a pooler may give to others."""
    return "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; " + "".join(
        f"SET LOCAL {name} TO '{value}'; "
        for since, name, value in _TRANSACTION
        if version >= since
    )


def error_position(error: psycopg2.Error) -> int | None:
    """Return the position, from 1, of what PostgreSQL found wrong in a statement, if it says."""
    if error.diag.statement_position is None:
        return None
    # PostgreSQL counts from the beginning of the message, which has the preamble first.
    return int(error.diag.statement_position) - getattr(error.cursor, "preamble_length", 0)
