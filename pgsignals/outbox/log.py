"""The outbox as a log: its rows between two snapshots, read in the order of their ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from weakref import WeakSet

from ..consumers.consumer_store import ConsumerStore
from ..consumers.log import Position
from ..consumers.schema import IMPATIENT
from ..postgres.session import Session
from ..triggers import names
from ..triggers.fingerprint import OUTBOX, Fingerprint
from .cursors import Snapshot, Window
from .reader import PAGE_BYTES, PAGE_ROWS, Cursor, Row, WindowReader

# Ranges of ids: from the first of two on, and below the second, if there is one.
Ids = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True)
class Poll:
    """The database at one moment: its snapshot, and a later count of ids and of what was shed.

    ``began``, if asked for, is the id of a transaction of ours: those above it began after so many
    ids had been given out.
    """

    snapshot: Snapshot
    given_out: int
    shed: int
    awake: bool
    began: int | None = None


@dataclass(frozen=True)
class Described:
    """A channel as the database describes it.

    It is its watcher's from the id ``since`` on, and its triggers were ``made`` for the last time
    at another. Its rows are of the tables ``relations``, by their OIDs; of one with a number, those
    with lower ids.
    """

    channel: int
    since: int
    made: int
    definition: str
    relations: Mapping[int, int | None]


_PREPARE = f"""
PREPARE pgsignals_poll (boolean, boolean) AS
SELECT pg_catalog.pg_current_snapshot()::text, i.last_value, s.last_value,
       CASE WHEN $1 THEN true
            ELSE pg_catalog.pg_try_advisory_lock({names.LOCK_CLASS}, {names.AWAKE_LOCK}) END,
       -- Begun once that has been read, on which it depends.
       CASE WHEN $2 AND i.last_value >= 0 THEN pg_catalog.pg_current_xact_id() END::text
FROM pgsignals.outbox_id AS i, pgsignals.outbox_shed AS s
"""


def read_statement(name: str, rows: int, size: int) -> str:
    """Prepares what reads a page: so many ``rows`` and bytes in ``size``, or one that is longer."""
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
    marking = "pg_catalog.pg_current_snapshot()::pg_catalog.text"

    def __init__(self, session: Session, consumer: str, holder: str, timeout: float) -> None:
        self._session = session
        self._name = consumer
        self._timeout = timeout
        self.consumer = ConsumerStore(session, self, consumer, holder, timeout)
        self._readers: WeakSet[WindowReader] = WeakSet()

    def _execute(self, statement: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        return self._session.execute(statement, parameters, timeout=self._timeout)

    def open(self) -> None:
        """Prepare the session: to be called once after it has connected."""
        # Acknowledgements may be lost when the server crashes: what they spared comes again.
        self._execute("SET synchronous_commit TO off")
        # There are no statistics, and reading goes by id alone.
        self._execute("SET enable_seqscan TO off; SET enable_bitmapscan TO off")
        self._execute("SET plan_cache_mode TO force_generic_plan; SET jit TO off")
        self._execute(_PREPARE)
        self._execute(read_statement("pgsignals_read", PAGE_ROWS, PAGE_BYTES))
        self._execute(f"LISTEN {names.WAKE_CHANNEL}")
        self._execute(
            "SELECT pg_catalog.pg_advisory_lock_shared(%s, %s)",
            (names.LOCK_CLASS, names.ALIVE_LOCK),
        )

    def surroundings(self) -> tuple[str, bool, datetime]:
        """The name of this history, whether other consumers live, and the server's clock.

        The history is that of the cluster, the database and its outbox, which a restore over them
        makes anew, and of the promotions that led here. The control file knows of a promotion only
        after the next checkpoint; names of WAL files do at once.
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
        return f"{cluster}-{database}-{outbox}/{int(timeline, 16)}", consumers > 1, clock

    def installation(self) -> str | None:
        """The fingerprint of the triggers as this consumer last knew them."""
        found = self._execute(
            "SELECT installation FROM pgsignals.consumers WHERE name = %s ORDER BY part LIMIT 1",
            (self._name,),
        )
        return found[0][0] if found else None

    def keep_installation(self, found: Fingerprint, at: datetime, announced: bool = False) -> bool:
        """Keep the fingerprint of the triggers, which have been right until ``at``.

        False where another process has marked a loss, unless that has been ``announced``. What an
        upgrade has put there, since it altered the outbox after ``found`` was read, stays.
        """
        return bool(
            self._execute(
                "UPDATE pgsignals.consumers SET verified_at = %s,"
                f" installation = CASE WHEN ({OUTBOX}) = %s THEN %s ELSE installation END"
                " WHERE name = %s AND (%s OR installation IS DISTINCT FROM '') RETURNING part",
                (at, found.outbox, found.encode(), self._name, announced),
            )
        )

    def mark_loss(self, since: datetime) -> None:
        """Mark a loss since the triggers were right, which whoever looks next announces."""
        self._execute(
            "UPDATE pgsignals.consumers SET installation = '',"
            " verified_at = least(verified_at, %s::timestamptz) WHERE name = %s",
            (since, self._name),
        )

    def doubt_installation(self, since: datetime | None) -> datetime | None:
        """Announce a Gap of what was written since the triggers were known to be right.

        That is ``since`` at the latest. Until a fingerprint is kept again, whoever starts announces
        one, too. Returns since when it is, beside what had not been acknowledged.
        """
        found = self._execute(
            "UPDATE pgsignals.consumers SET installation = '', acknowledged_at ="
            " least(acknowledged_at, verified_at, %(since)s::timestamptz),"
            " lost_until = pg_catalog.clock_timestamp() WHERE name = %(name)s"
            " RETURNING least(verified_at, %(since)s::timestamptz)",
            {"since": since, "name": self._name},
        )
        return min((at for (at,) in found if at is not None), default=since)

    def poll(self, awake: bool, begin: bool = False) -> Poll:
        """What there is by now; unless ``awake`` already, try to be who is.

        With ``begin`` it takes a transaction's id, of which there are so many.
        """
        [(snapshot, given_out, shed, awake, began)] = self._execute(
            "EXECUTE pgsignals_poll (%s, %s)", (awake, begin)
        )
        if began is not None:
            began = int(began)
            for reader in self._readers:
                reader.bounds.note(began + 1, given_out)
        return Poll(Snapshot.parse(snapshot), given_out, shed, awake, began)

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
        return self._reader(position, self.poll(awake=True).snapshot, clean)

    def present(self, reader: WindowReader) -> WindowReader:
        """A reader from now on, in place of one that nothing has been read with."""
        before = self.poll(awake=True, begin=True)
        assert before.began is not None
        first, now = before.began + 1, self.poll(awake=True).snapshot
        floor = reader.position.floor if now.xmin < first else before.given_out
        found = self._reader(Cursor(now, floor), now, clean=True)
        found.bounds.note(first, before.given_out)
        return found

    def _reader(self, cursor: Cursor, present: Snapshot, clean: bool) -> WindowReader:
        found = WindowReader(self, cursor, present, clean)
        self._readers.add(found)
        return found

    def shed_detail(self, count: int) -> str:
        return (
            f"{count} statements could not write to the outbox: it was full while no consumer"
            " was there, or a right, a partition or a setting of it was missing"
        )

    def read(self, window: Window, last_id: int) -> list[Row]:
        """The next rows of a window, by id: see Reader."""
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
        return [Row(row[0], row[1], row[2], self._session.text(row[3])) for row in rows]

    def release_awake(self) -> None:
        """Let writers send a notification again."""
        self._execute(
            "SELECT pg_catalog.pg_advisory_unlock(%s, %s)", (names.LOCK_CLASS, names.AWAKE_LOCK)
        )

    def wake_others(self) -> None:
        """Tell the other consumers that there may be something."""
        self._execute(names.wake_statement("awake"))

    def writers_under_way(self) -> bool:
        """Whether a transaction that has written to the outbox goes on."""
        [(found,)] = self._execute(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks"
            " WHERE relation = 'pgsignals.outbox'::pg_catalog.regclass"
            " AND mode = 'RowExclusiveLock' AND granted)"
        )
        return bool(found)

    def channels(self) -> list[Described]:
        """What the rows of each channel are, since when, and of which tables."""
        found = self._execute(
            "SELECT c.channel, c.since, c.made, c.definition, coalesce(r.tables, '{}')"
            " FROM pgsignals.channels AS c LEFT JOIN ("
            "   SELECT channel, pg_catalog.array_agg(ARRAY[relation::bigint, until]) AS tables"
            "   FROM pgsignals.relations GROUP BY channel) AS r ON r.channel = c.channel"
        )
        return [
            Described(channel, since, made, definition, dict(tables))
            for channel, since, made, definition, tables in found
        ]
