"""The statements by which an operator drops consumers, and sets them forward or back."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from psycopg2.extensions import cursor as Cursor

from ..consumers.slot_states import drop_slots
from ..core.errors import ConfigurationError, DatabaseError, near
from ..triggers.names import slot_name
from .cursors import BEGINNING
from .housekeeping import housekeeping_lock
from .inspection import read_outbox

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def drop_consumer(cursor: Cursor, name: str) -> int:
    """Forget a consumer with its dead letters and its slot; return how many dead letters.

    Raises DatabaseError when there is no such consumer, or a process reads for it.
    """
    _check_idle(cursor, name)
    cursor.execute("SELECT pg_catalog.current_database()")
    [(database,)] = cursor.fetchall()
    # First of all: without the consumer nobody would know whose slot it was.
    drop_slots(cursor, [slot_name(database, name)])
    cursor.execute("DELETE FROM pgsignals.consumers WHERE name = %s", (name,))
    cursor.execute("DELETE FROM pgsignals.backfills WHERE consumer = %s", (name,))
    cursor.execute("DELETE FROM pgsignals.dead_letters WHERE consumer = %s", (name,))
    return cursor.rowcount


# The token counts up, so that a holder that hangs, or has come since we looked, can no longer
# acknowledge over this. ``floor`` 0 is true of every snapshot; the next reader finds a higher one.
# A consumer that skips all that there was need not be told of losses among it.
_RESET = """
UPDATE pgsignals.consumers AS c
SET snapshot = %(snapshot)s, target = %(target)s, last_id = %(last_id)s, floor = 0,
    clean = %(skip)s, token = c.token + 1, holder = NULL,
    lost_until = CASE WHEN NOT %(skip)s
                      THEN greatest(c.lost_until, %(lost_until)s::timestamptz) END,
    shed = CASE WHEN %(skip)s THEN (SELECT last_value FROM pgsignals.outbox_shed) ELSE c.shed END,
    acknowledged_at = coalesce(%(at)s::timestamptz, c.acknowledged_at)
WHERE c.name = %(name)s
"""

# Of a consumer of the write-ahead log, whose slot goes on from there with the next process.
_SKIP = """
UPDATE pgsignals.consumers AS c
SET lsn = (pg_catalog.pg_current_wal_flush_lsn() - '0/0'::pg_catalog.pg_lsn)::bigint,
    commit_lsn = 0, messages = 0, target = NULL, clean = true, token = c.token + 1, holder = NULL,
    lost_until = NULL, shed = (SELECT last_value FROM pgsignals.outbox_shed),
    acknowledged_at = pg_catalog.clock_timestamp()
WHERE c.name = %(name)s
"""

# One statement, so that the id is looked for among exactly the rows that the target sees. Ids go up
# with time, except among statements that ran at once: rows above the first that is due may be
# earlier than it.
_FROM_TIME = """
SELECT pg_catalog.pg_current_snapshot()::text, pg_catalog.clock_timestamp(),
       (SELECT id FROM pgsignals.outbox
        WHERE substring(substring(payload, 1, 100) FROM '"t":([0-9]+)')::bigint >= %s
        ORDER BY id LIMIT 1)
"""


def reset_consumer(cursor: Cursor, name: str, target: str | datetime) -> datetime | None:
    """Move a consumer's cursor to ``"now"``, to the ``"earliest"`` event kept, or to a time.

    Given a time, every event whose ``at`` is that or later is delivered, and perhaps a few earlier
    ones. When the outbox does not go back that far, the consumer gets a Gap, and this returns until
    when events may be missing. A consumer of the write-ahead log can only go on from now, since the
    server keeps nothing of what has been read.

    Raises DatabaseError when there is no such consumer, a process reads for it, or the time is yet
    to come; ConfigurationError for a time without a zone, and for a consumer that cannot go there.
    """
    if isinstance(target, datetime) and target.utcoffset() is None:
        raise ConfigurationError(f"{target!r} has no time zone: give it one with tzinfo=.")
    _check_idle(cursor, name)
    if _reads_wal(cursor, name):
        if target != "now":
            raise ConfigurationError(
                f"{name!r} reads the write-ahead log, of which the server keeps nothing that has "
                "been read: it can only be reset to 'now'. `pgsignals backfill` delivers the rows "
                "that the tables have."
            )
        cursor.execute(_SKIP, {"name": name})
        cursor.execute("DELETE FROM pgsignals.parked WHERE consumer = %s", (name,))
        return None
    values: dict[str, object] = {
        "name": name,
        "target": None,
        "last_id": 0,
        "skip": target == "now",
        "lost_until": None,
        "at": None,
    }
    lost_until = None
    # Otherwise a segment that is to be read again could be emptied before the cursor says so.
    with housekeeping_lock(cursor):
        if isinstance(target, datetime):
            micros = (target - _EPOCH) // timedelta(microseconds=1)
            cursor.execute(_FROM_TIME, (micros,))
            [(snapshot, now, first)] = cursor.fetchall()
            if target > now:
                raise DatabaseError(f"{target} is yet to come: by the server's clock it is {now}.")
            if target < (kept_since := _kept_since(cursor)):
                values["lost_until"] = lost_until = kept_since
            values |= {"snapshot": snapshot, "at": target}
            if first is not None:
                values |= {"snapshot": str(BEGINNING), "target": snapshot, "last_id": first - 1}
        elif target == "earliest":
            values["snapshot"] = str(BEGINNING)
        else:
            cursor.execute(
                "SELECT pg_catalog.pg_current_snapshot()::text, pg_catalog.clock_timestamp()"
            )
            [(values["snapshot"], values["at"])] = cursor.fetchall()
        cursor.execute(_RESET, values)
        if target == "now":
            cursor.execute("DELETE FROM pgsignals.parked WHERE consumer = %s", (name,))
    return lost_until


def _kept_since(cursor: Cursor) -> datetime:
    """Return since when the outbox has everything: since its oldest full segment was begun.

    A segment gives way to the next only once it has rows. So the current one, which is the latest,
    may be new, and any other that has no rows has been emptied.
    """
    cursor.execute("SELECT segment, opened_at FROM pgsignals.segments ORDER BY opened_at DESC")
    (_, since), *others = cursor.fetchall()
    found: datetime = since
    for number, opened_at in others:
        cursor.execute(f"SELECT EXISTS (SELECT FROM pgsignals.outbox_{number})")
        if cursor.fetchall() == [(False,)]:
            break
        found = opened_at
    return found


def _reads_wal(cursor: Cursor, name: str) -> bool:
    """Whether a consumer reads the write-ahead log, and not the outbox."""
    cursor.execute(
        "SELECT EXISTS (SELECT FROM pgsignals.consumers"
        " WHERE name = %s AND epoch LIKE '%%-wal/%%')",
        (name,),
    )
    [(found,)] = cursor.fetchall()
    return bool(found)


def _check_idle(cursor: Cursor, name: str) -> None:
    parts = [each for each in read_outbox(cursor).consumers if each.name == name]
    if not parts:
        known = sorted({each.name for each in read_outbox(cursor).consumers})
        raise DatabaseError(f"There is no consumer {name!r}{near(name, known)}")
    if any(part.active for part in parts):
        raise DatabaseError(
            f"A process reads for the consumer {name!r} ({parts[0].holder}). Stop it first."
        )
