"""Retention: for how long, and up to which size, the outbox keeps events that are not read yet."""

from __future__ import annotations

from dataclasses import dataclass

from psycopg2.extensions import cursor as Cursor

from ..core.errors import ConfigurationError
from .schema import SEGMENTS

# A segment is emptied as a whole: with less than this for each, new events would be dropped.
LEAST_BYTES = SEGMENTS << 20
LEAST_SECONDS = 60.0


@dataclass(frozen=True)
class Retention:
    """Unread events are dropped when they are ``seconds`` old, or exceed ``bytes`` in all."""

    seconds: float
    bytes: int


def read_retention(cursor: Cursor) -> Retention:
    """Return the retention in force. The schema must be there."""
    cursor.execute("SELECT retention_seconds, retention_bytes FROM pgsignals.settings")
    [(seconds, size)] = cursor.fetchall()
    return Retention(seconds, size)


def set_retention(
    cursor: Cursor, seconds: float | None = None, size: int | None = None
) -> Retention:
    """Change what is given; return what is then in force. Consumers heed it within ten seconds.

    Raises ConfigurationError for less than a minute, or less than 8 MiB.
    """
    if seconds is not None and not LEAST_SECONDS <= seconds < float("inf"):
        raise ConfigurationError(
            f"Events cannot be kept for {seconds:g} s: give {LEAST_SECONDS:g} seconds or more."
        )
    if size is not None and not LEAST_BYTES <= size < 1 << 63:
        raise ConfigurationError(
            f"The outbox cannot be kept to {size} bytes: give {LEAST_BYTES} ({SEGMENTS} MiB) or "
            "more."
        )
    cursor.execute(
        "UPDATE pgsignals.settings SET"
        " retention_seconds = coalesce(%s, retention_seconds),"
        " retention_bytes = coalesce(%s, retention_bytes)"
        " RETURNING retention_seconds, retention_bytes",
        (seconds, size),
    )
    [(seconds_now, size_now)] = cursor.fetchall()
    return Retention(seconds_now, size_now)
