"""The server's queue of notifications, which all its databases share."""

from __future__ import annotations

from psycopg2.extensions import cursor as Cursor

# The notification queue is there for bursts: from this share on, somebody holds it up.
QUEUE_WARNING = 0.1


def read_queue_usage(cursor: Cursor) -> float:
    """The share, 0 to 1, of the server's notification queue that is in use."""
    cursor.execute("SELECT pg_catalog.pg_notification_queue_usage()")
    row = cursor.fetchone()
    return float(row[0]) if row is not None else 0.0
