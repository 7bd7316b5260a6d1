"""The outbox as a log: its rows between two snapshots, read in the order of their ids."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from weakref import WeakSet

from psycopg2 import errors as pg

from ..consumers.consumer_store import ConsumerStore
from ..consumers.decoding import Row
from ..consumers.log import Poll, Position
from ..consumers.schema import IMPATIENT
from ..core.logging import log
from ..postgres.session import Session
from ..postgres.snapshot import Snapshot
from ..triggers import names
from .awake_lock import AwakeLock
from .cursors import Window
from .reader import PAGE_BYTES, PAGE_ROWS, Cursor, WindowReader

# How often, awake, a consumer notes the id above which later transactions write: after so many
# rows, since each page goes again through those above the last note, or so long. A note costs a
# transaction id.
NOTE_ROWS = 50
NOTE_SECONDS = 0.1


@dataclass(frozen=True)
class Look:
    """The database at one moment: its snapshot and, read later, the latest id and the shed count.

    ``awake`` says whether this session has the awake lock. ``began``, if asked for, is the id of a
    transaction of ours: transactions above it began after ``given_out`` ids had been given out.
    """

    snapshot: Snapshot
    given_out: int
    shed: int
    awake: bool
    began: int | None = None


_PREPARE = f"""
PREPARE pgsignals_poll (boolean, boolean) AS
SELECT pg_catalog.pg_current_snapshot()::text, i.last_value, s.last_value,
       CASE WHEN $1 THEN true
            ELSE pg_catalog.pg_try_advisory_lock({names.LOCK_CLASS}, {names.AWAKE_LOCK}) END,
       -- Depends on last_value, so that the transaction's id is taken after last_value is read.
       CASE WHEN $2 AND i.last_value >= 0 THEN pg_catalog.pg_current_xact_id() END::text
FROM pgsignals.outbox_id AS i, pgsignals.outbox_shed AS s
"""


def read_statement(name: str, rows: int, size: int) -> str:
    """Return what prepares the reading of a page: ``rows`` rows and ``size`` bytes, or one row."""
    # The condition on txid is that of Window.holds, with since.xmax, the ended transactions,
    # target.xmax and target.running as the second to the fifth parameter.
    return f"""
PREPARE {name} (bigint, bigint, bigint[], bigint, bigint[]) AS
SELECT id, channel, relation, payload FROM (
  SELECT id, channel, relation, payload,
         pg_catalog.sum(pg_catalog.octet_length(payload)) OVER (ROWS UNBOUNDED PRECEDING) AS size
  FROM (
    SELECT id, channel, relation::bigint, payload FROM pgsignals.outbox
    WHERE id > $1 AND txid < $4 AND (txid >= $2 OR txid = ANY ($3)) AND txid <> ALL ($5)
    ORDER BY id LIMIT {rows}
  ) AS page
) AS sized
WHERE size - pg_catalog.octet_length(payload) < {size}
"""


class OutboxLog:
    """The outbox as one consumer sees it, through the session of the thread that reads: see Log."""

    columns: tuple[str, ...] = ("snapshot", "target", "last_id", "floor")
    start: Mapping[str, str] = {
        "snapshot": "pg_catalog.pg_current_snapshot()::text",
        "floor": "0",
        "shed": "(SELECT last_value FROM pgsignals.outbox_shed)",
    }
    missed = "c.floor < %(made)s"
    messages = "pgsignals.outbox"
    own = "lsn IS NULL"
    marking = "pg_catalog.pg_current_snapshot()::pg_catalog.text"

    def __init__(self, session: Session, consumer: str, holder: str, timeout: float) -> None:
        self._session = session
        self._timeout = timeout
        self.consumer = ConsumerStore(session, self, consumer, holder, timeout)
        self._readers: WeakSet[WindowReader] = WeakSet()
        self._lock = AwakeLock(self._execute)
        # The ids given out by the last look and by the last note, and when that note was taken.
        self._given_out = self._noted = 0
        self._noted_at = 0.0
        self._locked = False
        self.wake, self.stir, self.pause = self._lock.wake, self._lock.stir, self._lock.pause

    def _execute(self, statement: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        return self._session.execute(statement, parameters, timeout=self._timeout)

    def open(self) -> None:
        # A crash of the server may lose acknowledgements; their events are then delivered again.
        self._execute("SET synchronous_commit TO off")
        # The outbox has no statistics, so the planner would guess; reading goes by id alone.
        self._execute("SET enable_seqscan TO off; SET enable_bitmapscan TO off")
        self._execute("SET plan_cache_mode TO force_generic_plan; SET jit TO off")
        self._execute(_PREPARE)
        self._execute(read_statement("pgsignals_read", PAGE_ROWS, PAGE_BYTES))
        self._execute(
            "SELECT pg_catalog.pg_advisory_lock_shared(%s, %s)",
            (names.LOCK_CLASS, names.ALIVE_LOCK),
        )
        self._given_out = self._look().given_out

    def surroundings(self) -> tuple[str, datetime]:
        """See Log; also note whether other consumers live.

        The outbox's OID is part of the history, since a restore over the database makes the outbox
        anew: otherwise what was delivered since the dump would be gone without a word. The timeline
        comes from the name of a WAL file, which shows a promotion at once; the control file shows
        it only after the next checkpoint.
        """
        [(cluster, database, outbox, timeline, consumers, clock)] = self._execute(
            "SELECT system_identifier, d.oid, 'pgsignals.outbox'::pg_catalog.regclass::oid,"
            " pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8),"
            " (SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks"
            " WHERE locktype = 'advisory' AND classid = %s AND objid = %s AND objsubid = 2"
            " AND mode = 'ShareLock' AND granted AND database = d.oid),"
            " pg_catalog.clock_timestamp()"
            " FROM pg_catalog.pg_control_system(), pg_catalog.pg_database AS d"
            " WHERE d.datname = pg_catalog.current_database()",
            (names.LOCK_CLASS, names.ALIVE_LOCK),
        )
        self._lock.company = consumers > 1
        return f"{cluster}-{database}-{outbox}/{int(timeline, 16)}", clock

    def poll(self) -> Poll:
        new, now = self._given_out - self._noted, time.monotonic()
        due = new >= NOTE_ROWS or (new > 0 and now - self._noted_at >= NOTE_SECONDS)
        look = self._look(awake=not self._lock.wanted, begin=due and self._lock.awake)
        self._lock.looked(look.snapshot, look.awake)
        self._given_out = look.given_out
        if look.began is not None:
            self._noted, self._noted_at = look.given_out, now
        return Poll(look.snapshot, look.shed, now)

    def latest(self) -> Snapshot:
        return self._look().snapshot

    def acknowledged(self, position: Position) -> None: ...

    def writers(self) -> int:
        """The id of a transaction of ours: writers that are under way have lower ids."""
        began = self._look(begin=True).began
        assert began is not None
        return began

    def have_ended(self, writers: int, watermark: Snapshot | None = None) -> bool:
        seen = self._look().snapshot if watermark is None else watermark
        return seen.xmin > writers

    def _look(self, awake: bool = True, begin: bool = False) -> Look:
        """Look at the database; unless ``awake``, also try to get the awake lock.

        ``begin`` costs a transaction id, of which the server has a limited number.
        """
        [(snapshot, given_out, shed, awake, began)] = self._execute(
            "EXECUTE pgsignals_poll (%s, %s)", (awake, begin)
        )
        if began is not None:
            began = int(began)
            for reader in self._readers:
                reader.bounds.note(began + 1, given_out)
        return Look(Snapshot.parse(snapshot), given_out, shed, awake, began)

    def position(self, columns: Mapping[str, Any]) -> Cursor:
        target = columns["target"]
        return Cursor(
            Snapshot.parse(columns["snapshot"]),
            columns["floor"],
            None if target is None else Snapshot.parse(target),
            columns["last_id"],
        )

    def watermark(self, text: str) -> Snapshot:
        return Snapshot.parse(text)

    def reader(self, position: Position, clean: bool) -> WindowReader:
        assert isinstance(position, Cursor)
        return self._reader(position, self._look().snapshot, clean)

    def present(self, reader: WindowReader) -> WindowReader:
        """A reader from now on, in place of a ``reader`` that has read nothing."""
        before = self._look(begin=True)
        assert before.began is not None
        first, now = before.began + 1, self._look().snapshot
        # Transactions from ``first`` on have only ids above those given out before. That bounds all
        # rows that ``now`` does not see, unless an older transaction still runs.
        floor = reader.position.floor if now.xmin < first else before.given_out
        found = self._reader(Cursor(now, floor), now, clean=True)
        found.bounds.note(first, before.given_out)
        return found

    def _reader(self, cursor: Cursor, present: Snapshot, clean: bool) -> WindowReader:
        found = WindowReader(self, cursor, present, clean)
        self._readers.add(found)
        return found

    def keep(self) -> None:
        """See MovableLog: by a position, for which housekeeping leaves the rows behind it.

        One that another process has kept for the consumer is an earlier one, and stays.
        """
        self._execute(
            "UPDATE pgsignals.consumers SET floor = 0,"
            " snapshot = coalesce(snapshot, pg_catalog.pg_current_snapshot()::pg_catalog.text)"
            " WHERE name = %s",
            (self.consumer.name,),
        )

    def keeps(self) -> bool:
        return bool(
            self._execute(
                "SELECT 1 FROM pgsignals.consumers WHERE name = %s AND snapshot IS NOT NULL",
                (self.consumer.name,),
            )
        )

    def behind(self, snapshot: Snapshot) -> Cursor:
        return Cursor(snapshot, 0)

    def leave(self) -> None: ...

    def end(self) -> Snapshot:
        return self._look().snapshot

    def seen(self, position: Position) -> Snapshot:
        """See MovableLog: it may be later than the ``end``, if a chunk of a backfill was."""
        assert isinstance(position, Cursor)
        assert position.target is None
        return position.snapshot

    def forsake(self) -> None: ...

    def left(self) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...

    def shed_detail(self, count: int) -> str:
        return (
            f"{count} statements could not write to the outbox: it was full while no consumer"
            " was there, or it lacked a grant, a segment or a setting"
        )

    def read(self, window: Window, last_id: int) -> list[Row] | None:
        """The next rows of a window, by id: see Reader."""
        try:
            rows = self._execute(
                IMPATIENT + "EXECUTE pgsignals_read (%s, %s, %s::bigint[], %s, %s::bigint[])",
                (
                    max(window.after, last_id),
                    window.since.xmax,
                    list(window.ended),
                    window.target.xmax,
                    list(window.target.running),
                ),
            )
        except pg.LockNotAvailable:
            if not self._locked:
                log.warning("another session has locked the outbox: events wait until it lets go")
            self._locked = True
            return None
        self._locked = False
        return [Row(row[0], row[1], row[2], self._session.text(row[3])) for row in rows]
