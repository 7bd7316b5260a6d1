"""The server's queue of notifications, which all its databases share."""

from __future__ import annotations

from psycopg2.extensions import cursor as Cursor

# The queue is for bursts: if this share of it is in use, some listener does not read.
QUEUE_WARNING = 0.1


def read_queue_usage(cursor: Cursor) -> float:
    """Return the share, 0 to 1, of the server's notification queue that is in use."""
    cursor.execute("SELECT pg_catalog.pg_notification_queue_usage()")
    row = cursor.fetchone()
    return float(row[0]) if row is not None else 0.0
