"""What an operator does to consumers and dead letters, as statements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg2.extensions import cursor as Cursor

from ..errors import DatabaseError, near
from .cursors import BEGINNING
from .inspection import read_outbox
from .schema import WAKE_CHANNEL


@dataclass(frozen=True)
class KeptLetter:
    """A dead letter: ``number`` counts the rows of the message in ``payload``, from 0."""

    id: int
    consumer: str
    receiver: str
    uid: str
    number: int
    payload: str
    error: str
    traceback: str
    attempts: int
    at: datetime


_LETTERS = (
    "SELECT id, consumer, receiver, uid, number, payload, error, traceback, attempts, at"
    " FROM pgsignals.dead_letters"
)


def dead_letters(cursor: Cursor) -> list[KeptLetter]:
    """All of them, the latest last."""
    cursor.execute(f"{_LETTERS} ORDER BY id")
    return [KeptLetter(*row) for row in cursor.fetchall()]


def dead_letter(cursor: Cursor, key: int) -> KeptLetter:
    """One of them. Raises DatabaseError when there is none with this id."""
    cursor.execute(f"{_LETTERS} WHERE id = %s", (key,))
    row = cursor.fetchone()
    if row is None:
        raise DatabaseError(f"There is no dead letter {key}: see `pgsignals dead-letters list`.")
    return KeptLetter(*row)


def retry(cursor: Cursor, keys: Sequence[int] | None) -> int:
    """Have these, or all, delivered again by whoever is active; how many."""
    cursor.execute(
        "UPDATE pgsignals.dead_letters SET retry = true"
        " WHERE %(keys)s::bigint[] IS NULL OR id = ANY (%(keys)s::bigint[])",
        {"keys": None if keys is None else list(keys)},
    )
    count = cursor.rowcount
    cursor.execute(f"NOTIFY {WAKE_CHANNEL}, 'redeliver'")
    return count


def drop_letters(cursor: Cursor, keys: Sequence[int] | None) -> int:
    """Forget these, or all; how many."""
    cursor.execute(
        "DELETE FROM pgsignals.dead_letters"
        " WHERE %(keys)s::bigint[] IS NULL OR id = ANY (%(keys)s::bigint[])",
        {"keys": None if keys is None else list(keys)},
    )
    return cursor.rowcount


def drop_consumer(cursor: Cursor, name: str) -> int:
    """Forget a consumer with its dead letters; how many those were.

    Raises DatabaseError when there is none, or a process reads for it.
    """
    _check_idle(cursor, name)
    cursor.execute("DELETE FROM pgsignals.consumers WHERE name = %s", (name,))
    cursor.execute("DELETE FROM pgsignals.backfills WHERE consumer = %s", (name,))
    cursor.execute("DELETE FROM pgsignals.dead_letters WHERE consumer = %s", (name,))
    return cursor.rowcount


def reset_consumer(cursor: Cursor, name: str, target: str) -> None:
    """Have a consumer go on from ``"now"``, or from the ``"earliest"`` that there is.

    Raises DatabaseError when there is none, or a process reads for it.
    """
    _check_idle(cursor, name)
    if target == "earliest":
        cursor.execute("SELECT %s", (str(BEGINNING),))
    else:
        cursor.execute("SELECT pg_catalog.pg_current_snapshot()::text")
    [(snapshot,)] = cursor.fetchall()
    # The token counts up, so that a holder that hangs, or has come since we looked, can no longer
    # acknowledge from where it was. Below 0 there is no id: a later look will tell better.
    cursor.execute(
        "UPDATE pgsignals.consumers SET snapshot = %s, target = NULL, last_id = 0, floor = 0,"
        " clean = %s, lost_until = NULL, token = token + 1, holder = NULL,"
        " shed = (SELECT last_value FROM pgsignals.outbox_shed) WHERE name = %s",
        (snapshot, target == "now", name),
    )


def _check_idle(cursor: Cursor, name: str) -> None:
    parts = [each for each in read_outbox(cursor).consumers if each.name == name]
    if not parts:
        known = sorted({each.name for each in read_outbox(cursor).consumers})
        raise DatabaseError(f"There is no consumer {name!r}{near(name, known)}")
    if any(part.active for part in parts):
        raise DatabaseError(
            f"A process reads for the consumer {name!r} ({parts[0].holder}). Stop it first."
        )
