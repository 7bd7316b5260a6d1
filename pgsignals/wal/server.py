"""The settings of a server whose write-ahead log is to be read."""

from __future__ import annotations

from psycopg2.extensions import cursor as Cursor

from ..core.errors import ConfigurationError

BOUND = "ALTER SYSTEM SET max_slot_wal_keep_size = '10GB'; SELECT pg_reload_conf()"
LOGICAL = "ALTER SYSTEM SET wal_level = 'logical'"


def refuse_unfit(cursor: Cursor, *, unbounded: bool) -> None:
    """Raise ConfigurationError if the log cannot be read, or could fill up the server's disk.

    ``unbounded``: the server need not bound what it keeps for a consumer that is away.
    """
    cursor.execute(
        "SELECT pg_catalog.current_setting('wal_level'),"
        " pg_catalog.current_setting('max_slot_wal_keep_size')"
    )
    [(level, bound)] = cursor.fetchall()
    if level != "logical":
        raise ConfigurationError(
            f"WAL delivery reads the write-ahead log, and this server writes it with wal_level "
            f"{level!r}: run {LOGICAL} and restart the server. On a hosted one that is a setting "
            'of its own: see docs/wal.md. Or use delivery="outbox".'
        )
    if bound == "-1" and not unbounded:
        raise ConfigurationError(
            "While a named consumer is away, the server keeps the write-ahead log for it, and here "
            "without a bound (max_slot_wal_keep_size is -1), until its disk is full. Run "
            f"{BOUND}, or start with allow_unbounded_wal=True."
        )
