"""Keeps the outbox small: empties segments that all consumers have read, or that exceed retention.

Segments that all have read are kept for a while (``keep_seconds`` of the settings) for readers that
come back with a resume token.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from psycopg2 import errors as pg
from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from ..consumers.consumer_store import LIVES, claim_key
from ..consumers.liveness import Stillness
from ..consumers.parking_store import drop_parked
from ..consumers.schema import LOCK_WAIT
from ..core.logging import log
from ..core.redaction import error_text
from ..core.rng import chance
from ..core.threads import Thread
from ..postgres.connection import opened, transaction
from ..postgres.snapshot import Snapshot
from ..triggers import names
from .inspection import held_claims
from .schema import SEGMENTS

EVERY_SECONDS = 10.0
# The next segment is begun when the current one has more bytes, or is older, than this.
SEGMENT_BYTES = 128 << 20
SEGMENT_SECONDS = 3600.0
# The consumer of a process without a name is forgotten so long after its lease, without a beat.
FORGET_SECONDS = 60.0


@dataclass(frozen=True)
class _Segment:
    number: int
    size: int
    last_id: int | None
    age: float
    """Seconds since the current segment was begun; for another, since the one after it was."""

    @property
    def table(self) -> sql.Identifier:
        return sql.Identifier("pgsignals", f"outbox_{self.number}")


@dataclass(frozen=True)
class _Reader:
    name: str
    part: int
    snapshot: Snapshot
    floor: int


class Housekeeper:
    """Tidies up every few seconds, in a thread and connections of its own.

    Only one process at a time tidies up. ``chore`` is what each process has to do for itself, with
    the same connection.
    """

    def __init__(
        self, dsn: str, timeout: float, chore: Callable[[Cursor], object] = lambda cursor: None
    ) -> None:
        self._dsn = dsn
        self._timeout = timeout
        self._chore = chore
        self._still = Stillness[tuple[str, int]]()
        self._ending = threading.Event()
        self._thread = Thread("housekeeper", self._run)

    @property
    def failure(self) -> str:
        """The error that has ended the thread; empty if there was none."""
        return self._thread.failure

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End, waiting at most ``timeout`` seconds."""
        self._ending.set()
        self._thread.join(timeout)

    def abandon(self) -> None:
        """Do nothing in the child of a fork, which does not have the thread."""

    def _run(self) -> None:
        while not self._ending.wait(EVERY_SECONDS * chance.uniform(0.5, 1.0)):
            try:
                with opened(self._dsn, self._timeout, self._timeout) as cursor:
                    tidy(cursor, still=self._still)
                    self._chore(cursor)
            # Whatever it is: without the thread, this process would never empty the outbox again.
            except Exception as error:
                log.warning(
                    "what durable delivery keeps could not be tidied up, and goes on growing; "
                    "trying again within %d seconds: %s",
                    EVERY_SECONDS,
                    error_text(error),
                )


def tidy(
    cursor: Cursor,
    segment_bytes: int = SEGMENT_BYTES,
    segment_seconds: float = SEGMENT_SECONDS,
    still: Stillness[tuple[str, int]] | None = None,
) -> list[int]:
    """Empty the segments that can be emptied, unless another process does; return their numbers.

    A segment that somebody has locked is left for the next time. The cursor's connection must be in
    autocommit mode. ``still`` remembers the consumers' beats from one call to the next.
    """
    key = (names.LOCK_CLASS, names.HOUSEKEEPING_LOCK)
    cursor.execute("SELECT pg_catalog.pg_try_advisory_lock(%s, %s)", key)
    [(ours,)] = cursor.fetchall()
    if not ours:
        return []
    try:
        with _impatient(cursor):
            if still is not None:
                _forget_processes(cursor, still)
            _forget(cursor)
            _set_back(cursor)
        cursor.execute(
            "SELECT retention_seconds, retention_bytes, coalesce(keep_seconds, 0), s.last_value"
            " FROM pgsignals.settings, pgsignals.outbox_segment AS s"
        )
        [(seconds, size, keep, current)] = cursor.fetchall()
        segments = _segments(cursor, current)
        emptied = _empty_read(cursor, segments, keep)
        for consumer, receiver in sorted(set(drop_parked(cursor, seconds, size))):
            log.error(
                "the receiver %s of %s is so late that events parked for it have been dropped: "
                "make it faster, or keep more with `pgsignals retention`",
                receiver,
                consumer,
            )
        left = [segment for segment in segments if segment.number not in emptied]
        emptied += _enforce(cursor, left, seconds, size)
        _forget_processed(
            cursor, [segment for segment in segments if segment.number not in emptied]
        )
        _turn(cursor, segments, emptied, segment_bytes, segment_seconds, size)
        return emptied
    except pg.LockNotAvailable:
        log.debug("another session has locked what is to be tidied up: the next round does it")
        return []
    finally:
        cursor.execute("SELECT pg_catalog.pg_advisory_unlock(%s, %s)", key)


@contextmanager
def _impatient(cursor: Cursor) -> Iterator[None]:
    """Run a transaction that waits for a lock no longer than LOCK_WAIT; raises LockNotAvailable.

    Otherwise, in a program of greenlets whose psycopg2 does not yield, all greenlets would wait.
    """
    with transaction(cursor):
        cursor.execute(f"SET LOCAL lock_timeout TO '{LOCK_WAIT}'")
        yield


@contextmanager
def housekeeping_lock(cursor: Cursor) -> Iterator[None]:
    """Wait until no process tidies up, and keep every process from it meanwhile."""
    key = (names.LOCK_CLASS, names.HOUSEKEEPING_LOCK)
    cursor.execute("SELECT pg_catalog.pg_advisory_lock(%s, %s)", key)
    try:
        yield
    finally:
        if not cursor.connection.closed:
            cursor.execute("SELECT pg_catalog.pg_advisory_unlock(%s, %s)", key)


def _forget_processes(cursor: Cursor, still: Stillness[tuple[str, int]]) -> None:
    """Forget the unnamed consumers of processes that have ended.

    A process that only lost its session, by a restart of the server say, has FORGET_SECONDS to come
    back.
    """
    cursor.execute("SELECT name, part, token, beat, lease FROM pgsignals.consumers WHERE ephemeral")
    rows = cursor.fetchall()
    held = held_claims(cursor)
    found = {
        (name, part): (token, beat, lease, claim_key(name, part, token) in held)
        for name, part, token, beat, lease in rows
    }
    for (name, part), seconds in still.note(found).items():
        token, beat, lease, _ = found[name, part]
        if seconds <= lease + FORGET_SECONDS:
            continue
        cursor.execute(
            "DELETE FROM pgsignals.consumers"
            " WHERE name = %s AND part = %s AND token = %s AND beat = %s",
            (name, part, token, beat),
        )
        if cursor.rowcount:
            log.info("forgot the consumer of the %s, which has ended", name)


def _set_back(cursor: Cursor) -> None:
    """Move the segments' times back if one is in the future, since the clock was set back.

    Otherwise no segment would seem old enough to be emptied until the clock is there again.
    """
    cursor.execute(
        "UPDATE pgsignals.segments SET opened_at = opened_at - ahead"
        " FROM (SELECT pg_catalog.max(opened_at) - pg_catalog.clock_timestamp() AS ahead"
        " FROM pgsignals.segments) AS latest WHERE ahead > interval '0'"
    )


def _forget_processed(cursor: Cursor, segments: Sequence[_Segment]) -> None:
    """Forget the records of ``once`` that are older than retention and than all rows of the outbox.

    Retention alone would not do: where the clock was set forward, a record that seems old may be of
    an event that is delivered again.
    """
    cursor.execute(
        "DELETE FROM pgsignals.processed AS p USING pgsignals.settings"
        " WHERE p.at < pg_catalog.now() - retention_seconds * interval '1 s'"
        " AND p.at < coalesce((SELECT pg_catalog.min(opened_at) FROM pgsignals.segments"
        " WHERE segment = ANY (%s)), 'infinity')",
        ([segment.number for segment in segments if segment.last_id is not None],),
    )


def _forget(cursor: Cursor) -> None:
    cursor.execute(f"DELETE FROM pgsignals.members AS m WHERE NOT {LIVES}")
    cursor.execute(
        "DELETE FROM pgsignals.backfills AS b USING pgsignals.settings"
        " WHERE greatest(b.changed_at, (SELECT pg_catalog.max(p.changed_at)"
        "   FROM pgsignals.backfill_parts AS p WHERE p.backfill = b.id))"
        "   < pg_catalog.now() - retention_seconds * interval '1 s'"
        " AND (b.state <> 'running' OR NOT EXISTS (SELECT FROM pgsignals.backfill_parts AS p"
        "   WHERE p.backfill = b.id AND NOT p.finished))"
    )


def _segments(cursor: Cursor, current: int) -> list[_Segment]:
    """Return the segments: the current one, then those never begun, then the others, oldest first.

    Segments that somebody has locked are left out. Raises LockNotAvailable if the current one is.
    """
    cursor.execute(
        "SELECT segment, extract(epoch FROM pg_catalog.clock_timestamp() - opened_at)::float8"
        " FROM pgsignals.segments"
    )
    opened = dict(cursor.fetchall())
    others = [number for number in range(SEGMENTS) if number != current]
    others.sort(key=lambda number: -opened.get(number, math.inf))
    found = []
    # Each with the segment that was begun after it, since when it has not grown.
    for number, following in zip((current, *others), (current, *others[1:], current), strict=True):
        try:
            with _impatient(cursor):
                cursor.execute(
                    sql.SQL(
                        "SELECT pg_catalog.pg_total_relation_size({}::pg_catalog.regclass),"
                        " (SELECT pg_catalog.max(id) FROM {})"
                    ).format(
                        sql.Literal(f"pgsignals.outbox_{number}"),
                        sql.Identifier("pgsignals", f"outbox_{number}"),
                    )
                )
                [(size, last_id)] = cursor.fetchall()
        except pg.LockNotAvailable:
            if number == current:
                raise
            continue
        found.append(_Segment(number, size, last_id, opened.get(following, 0.0)))
    return found


def _readers(cursor: Cursor) -> list[_Reader]:
    cursor.execute(
        "SELECT name, part, snapshot, floor FROM pgsignals.consumers WHERE snapshot IS NOT NULL"
    )
    return [
        _Reader(name, part, Snapshot.parse(text), floor)
        for name, part, text, floor in cursor.fetchall()
    ]


def _late(cursor: Cursor, segment: _Segment, readers: Sequence[_Reader]) -> list[_Reader]:
    """Return the readers that have not read all rows of the segment."""
    found = []
    for reader in readers:
        if segment.last_id is None or reader.floor >= segment.last_id:
            continue
        cursor.execute(
            sql.SQL(
                "SELECT EXISTS (SELECT FROM {}"
                " WHERE id > %s AND (txid >= %s OR txid = ANY (%s::bigint[])))"
            ).format(segment.table),
            (reader.floor, reader.snapshot.xmax, list(reader.snapshot.running)),
        )
        [(late,)] = cursor.fetchall()
        if late:
            found.append(reader)
    return found


def _empty_read(cursor: Cursor, segments: Sequence[_Segment], keep: float) -> list[int]:
    readers = _readers(cursor)
    emptied = []
    for segment in segments[1:]:
        if segment.last_id is None or segment.age < keep:
            continue
        with _impatient(cursor):
            late = _late(cursor, segment, readers)
        if not late and _empty(cursor, segment):
            emptied.append(segment.number)
    return emptied


def _enforce(cursor: Cursor, segments: Sequence[_Segment], seconds: float, size: int) -> list[int]:
    """Drop segments older than ``seconds``, and the oldest ones while all exceed ``size`` bytes."""
    emptied = []
    total = sum(segment.size for segment in segments)
    for segment in segments[1:]:
        if segment.last_id is None or (segment.age <= seconds and total <= size):
            continue
        if _empty(cursor, segment, dropping=True):
            emptied.append(segment.number)
            total -= segment.size
    return emptied


def _empty(cursor: Cursor, segment: _Segment, dropping: bool = False) -> bool:
    """Empty a segment; False if it is in use, or a consumer has not read all of it.

    With ``dropping``, consumers that have not read it do not keep it, and are told of the loss.
    """
    try:
        with _impatient(cursor):
            return _empty_locked(cursor, segment, dropping)
    except pg.LockNotAvailable:
        return False


def _empty_locked(cursor: Cursor, segment: _Segment, dropping: bool) -> bool:
    cursor.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(segment.table))
    # A writer that took this segment for the current one may have written to it since we looked.
    cursor.execute(
        sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE id > %s)").format(segment.table),
        (segment.last_id,),
    )
    [(more,)] = cursor.fetchall()
    if more:
        return False
    # Look again under the lock, when nobody can commit any more: a transaction that was under way
    # before may have lower ids than rows that all have read.
    late = _late(cursor, segment, _readers(cursor))
    if late and not dropping:
        return False
    cursor.execute(sql.SQL("TRUNCATE {}").format(segment.table))
    # Under the lock, so that the snapshot sees every transaction that wrote to the segment.
    cursor.execute(
        "UPDATE pgsignals.segments SET emptied_id = %s,"
        " emptied_snapshot = pg_catalog.pg_current_snapshot()::text WHERE segment = %s",
        (segment.last_id, segment.number),
    )
    for reader in late:
        log.error(
            "the consumer %s is so late that %d bytes of its events have been dropped: make it "
            "faster, or keep more with `pgsignals retention`",
            reader.name,
            segment.size,
        )
        cursor.execute(
            "UPDATE pgsignals.consumers SET lost_until = pg_catalog.clock_timestamp()"
            " WHERE name = %s AND part = %s",
            (reader.name, reader.part),
        )
    return True


def _turn(
    cursor: Cursor,
    segments: Sequence[_Segment],
    emptied: Sequence[int],
    segment_bytes: int,
    segment_seconds: float,
    retention_bytes: int,
) -> None:
    """Begin another segment if the current one is big or old, and another is empty.

    A segment that could not be emptied, since a transaction that wrote to it goes on, is skipped.
    Otherwise it would stop the ring, and the current one would grow beyond any retention.
    """
    current, *others = segments
    bound = min(segment_bytes, retention_bytes // SEGMENTS)
    due = current.size > bound or current.age > segment_seconds
    if current.last_id is None or not due:
        return
    free = (segment for segment in others if segment.last_id is None or segment.number in emptied)
    if (following := next(free, None)) is None:
        return
    cursor.execute(
        "INSERT INTO pgsignals.segments VALUES (%s) ON CONFLICT (segment)"
        " DO UPDATE SET opened_at = excluded.opened_at",
        (following.number,),
    )
    # Only after the time is noted: from here on writers use the segment.
    cursor.execute("SELECT pg_catalog.setval('pgsignals.outbox_segment', %s)", (following.number,))
