"""The statements by which a consumer reads the outbox and keeps its cursor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from ..connection import Session
from ..triggers import names
from .cursors import Snapshot, Window
from .schema import WAKE_CHANNEL

# A page: so many rows and so many bytes, or one row that is longer. Ten bytes may be an event, and
# a page of events is held in memory at once.
PAGE_ROWS = 2000
PAGE_BYTES = 256 << 10


@dataclass(frozen=True)
class Cursor:
    """How far a part of a consumer has acknowledged.

    All that ``snapshot`` sees; with a ``target``, also the rows up to ``last_id`` of the window
    between both. Rows that it does not see have ids above ``floor``.
    """

    snapshot: Snapshot
    floor: int
    target: Snapshot | None = None
    last_id: int = 0


@dataclass(frozen=True)
class Told:
    """What a consumer's receivers know of: losses beyond it have yet to be announced.

    ``epoch`` is the database's history, ``shed`` counts what writers left out, ``lost_until`` is
    until when rows were dropped that had not been read.
    """

    epoch: str
    shed: int
    lost_until: datetime | None = None


@dataclass(frozen=True)
class Claim:
    """A part that this process may read: its ``cursor``, and what is known of its past.

    ``token`` counts the claims, so that a former holder's acknowledgement is refused. ``clean``:
    the former one had acknowledged all that it delivered. ``lost_until``: as in Told, of a loss
    that had not been announced when the claim was made.
    """

    part: int
    token: int
    cursor: Cursor
    clean: bool
    told: Told
    acknowledged_at: datetime
    lost_until: datetime | None


@dataclass(frozen=True)
class Look:
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
class Row:
    """A message in the outbox."""

    id: int
    channel: int
    payload: str


@dataclass(frozen=True)
class Letter:
    """An event that a receiver could not take, to be kept."""

    receiver: str
    uid: str
    channel: int
    number: int
    id: int | None
    payload: str
    error: str
    traceback: str
    attempts: int


@dataclass(frozen=True)
class DeadLetter:
    """A kept event that somebody wants delivered again."""

    key: int
    receiver: str
    channel: int
    number: int
    payload: str
    attempts: int


@dataclass(frozen=True)
class Progress:
    """What a page's acknowledgement means for a backfill; ``size`` is the page's, in bytes.

    ``scanned`` rows, up to the one of ``last_key``, have been gone through, of which ``delivered``
    were events; ``finished``: there are no more.
    """

    number: int
    last_key: Sequence[str] | None
    scanned: int
    finished: bool
    size: int
    delivered: int = 0

    def then(self, later: Progress) -> Progress:
        """Both in one."""
        return replace(
            later,
            last_key=later.last_key or self.last_key,
            scanned=self.scanned + later.scanned,
            delivered=self.delivered + later.delivered,
        )


_PREPARE = f"""
PREPARE pgsignals_look (boolean, boolean) AS
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
SELECT id, channel, payload FROM (
  SELECT id, channel, payload,
         pg_catalog.sum(pg_catalog.octet_length(payload)) OVER (ROWS UNBOUNDED PRECEDING) AS size
  FROM (
    SELECT id, channel, payload FROM pgsignals.outbox
    WHERE id > $1 AND txid < $4 AND (txid >= $2 OR txid = ANY ($3)) AND txid <> ALL ($5)
    ORDER BY id LIMIT {rows}
  ) AS page
) AS sized
WHERE size - pg_catalog.octet_length(payload) < {size}
"""


# While its session lives, a holder has the lock of its claim, whose key counts up with the token.
# When it has ended, so has the holder, unless it was the server that ended it, or this is another
# server: somebody who is cut off may not know yet, and delivers until the lease is over. A crash
# resets the statistics, also one that the postmaster survives.
# A claim, unlike an acknowledgement, must outlive a crash of the server: where a former holder had
# left it clean, nobody else would know that what the new one delivers may have been delivered.
_CLAIM = """
WITH free AS MATERIALIZED (
  SELECT name, part FROM pgsignals.consumers
  WHERE name = %(name)s AND part = %(part)s
    AND (holder IS NULL OR holder = %(holder)s OR lease_until < pg_catalog.clock_timestamp()
         OR (epoch = %(epoch)s
             AND lease_until - %(lease)s * interval '1 s' > greatest(
               pg_catalog.pg_postmaster_start_time(),
               (SELECT stats_reset FROM pg_catalog.pg_stat_bgwriter))
             AND pg_catalog.pg_try_advisory_xact_lock(
               %(class)s, ((%(key)s::bigint + token) %% 2147483647)::int)))
  FOR UPDATE
)
UPDATE pgsignals.consumers AS c
SET holder = %(holder)s, token = c.token + 1, clean = false, channels = %(channels)s,
    lease_until = pg_catalog.clock_timestamp() + %(lease)s * interval '1 s'
FROM free, pgsignals.consumers AS former
WHERE c.name = free.name AND c.part = free.part
  AND former.name = free.name AND former.part = free.part
RETURNING c.token, c.snapshot, c.target, c.last_id, c.floor, former.clean, c.shed, c.epoch,
          c.acknowledged_at, c.lost_until,
          pg_catalog.pg_try_advisory_lock(
            %(class)s, ((%(key)s::bigint + c.token) %% 2147483647)::int),
          pg_catalog.set_config('synchronous_commit', 'on', true)
"""

_REGISTER = """
INSERT INTO pgsignals.consumers
  (name, part, parts, ephemeral, snapshot, floor, shed, epoch, channels,
   acknowledged_at, lost_until)
SELECT %(name)s, part, %(parts)s, %(ephemeral)s, pg_catalog.pg_current_snapshot()::text, 0,
       (SELECT last_value FROM pgsignals.outbox_shed), %(epoch)s, %(channels)s,
       coalesce(%(since)s::timestamptz, pg_catalog.clock_timestamp()),
       CASE WHEN %(since)s::timestamptz IS NOT NULL THEN pg_catalog.clock_timestamp() END
FROM pg_catalog.generate_series(0, %(parts)s - 1) AS part
ON CONFLICT (name, part) DO NOTHING
"""

# While a loss has yet to be announced, the time stays from which on something may be missing.
_ACKNOWLEDGE = """
UPDATE pgsignals.consumers AS c
SET snapshot = %(snapshot)s, target = %(target)s, last_id = %(last_id)s, floor = %(floor)s,
    shed = %(shed)s, epoch = %(epoch)s,
    acknowledged = c.acknowledged + %(count)s,
    acknowledged_at = CASE WHEN %(current)s AND (c.lost_until IS NULL
                                OR c.lost_until <= %(lost_until)s::timestamptz)
                           THEN pg_catalog.clock_timestamp() ELSE c.acknowledged_at END,
    lost_until = CASE WHEN c.lost_until <= %(lost_until)s::timestamptz THEN NULL
                      ELSE c.lost_until END,
    holder = CASE WHEN %(release)s THEN NULL ELSE c.holder END,
    clean = %(release)s AND %(clean)s,
    lease_until = pg_catalog.clock_timestamp() + %(lease)s * interval '1 s'
WHERE c.name = %(name)s AND c.part = %(part)s AND c.holder = %(holder)s AND c.token = %(token)s
RETURNING c.lost_until
"""

# Sent with an acknowledgement, as one transaction that ends in the server: a process that hangs
# does not keep its successor from the row. Nor does it write over what that has noted.
_NOTE = """
WITH ours AS (
  SELECT FROM pgsignals.consumers
  WHERE name = %(name)s AND part = %(part)s AND holder = %(holder)s AND token = %(token)s
  FOR UPDATE
)
UPDATE pgsignals.backfill_parts AS p
SET last_key = coalesce(%(last_key{0})s::text[], p.last_key), done = p.done + %(scanned{0})s,
    delivered = p.delivered + %(delivered{0})s, finished = %(finished{0})s,
    changed_at = pg_catalog.clock_timestamp()
FROM ours WHERE p.backfill = %(number{0})s AND p.part = %(part)s;
"""

_BURY = """
INSERT INTO pgsignals.dead_letters
  (consumer, receiver, uid, channel, number, payload, error, traceback, attempts)
SELECT %(consumer)s, %(receiver)s, %(uid)s, %(channel)s, %(number)s,
       coalesce((SELECT payload FROM pgsignals.outbox WHERE id = %(id)s), %(payload)s),
       %(error)s, %(traceback)s, %(attempts)s
ON CONFLICT (consumer, receiver, uid) DO UPDATE
SET error = excluded.error, traceback = excluded.traceback, attempts = excluded.attempts,
    at = excluded.at, retry = false
"""


class Store:
    """The outbox as one consumer sees it, through the session of the thread that reads."""

    def __init__(self, session: Session, consumer: str, holder: str, timeout: float) -> None:
        self._session = session
        self._consumer = consumer
        self._holder = holder
        self._timeout = timeout

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
        self._execute(f"LISTEN {WAKE_CHANNEL}")
        self._execute(
            "SELECT pg_catalog.pg_advisory_lock_shared(%s, %s)",
            (names.LOCK_CLASS, names.ALIVE_LOCK),
        )

    def surroundings(self) -> tuple[str, bool]:
        """The name of this history, and whether other consumers live.

        The history is that of the cluster, the database and its outbox, which a restore over them
        makes anew, and of the promotions that led here. The control file knows of a promotion only
        after the next checkpoint; names of WAL files do at once.
        """
        [(cluster, database, outbox, timeline, consumers)] = self._execute(
            "SELECT system_identifier, d.oid, 'pgsignals.outbox'::pg_catalog.regclass::oid,"
            " pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8),"
            " (SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks"
            " WHERE locktype = 'advisory' AND classid = %s AND objid = %s AND objsubid = 2"
            " AND mode = 'ShareLock' AND granted AND database = d.oid)"
            " FROM pg_catalog.pg_control_system(), pg_catalog.pg_database AS d"
            " WHERE d.datname = pg_catalog.current_database()",
            (names.LOCK_CLASS, names.ALIVE_LOCK),
        )
        return f"{cluster}-{database}-{outbox}/{int(timeline, 16)}", consumers > 1

    def register(
        self,
        parts: int,
        ephemeral: bool,
        epoch: str,
        channels: Sequence[int],
        since: datetime | None = None,
    ) -> tuple[int, bool]:
        """Make the consumer known, from now on; the parts it has, and whether it is new.

        ``since``: it was known before, and all until then had been acknowledged. If it is new all
        the same, what came after that is noted as lost.
        """
        added = self._execute(
            _REGISTER + " RETURNING part",
            {
                "name": self._consumer,
                "parts": parts,
                "ephemeral": ephemeral,
                "epoch": epoch,
                "channels": list(channels),
                "since": since,
            },
        )
        [(present,)] = self._execute(
            "SELECT parts FROM pgsignals.consumers WHERE name = %s AND part = 0", (self._consumer,)
        )
        return int(present), bool(added)

    def claim(self, part: int, lease: float, channels: Sequence[int], epoch: str) -> Claim | None:
        """Become the one who reads a part for ``lease`` seconds; None when somebody else is.

        A holder whose lease is over is no more; nor, in the same history of the same server, one
        whose session has ended.
        """
        found = self._execute(
            _CLAIM,
            {
                "name": self._consumer,
                "part": part,
                "holder": self._holder,
                "class": names.CURSOR_CLASS,
                "key": names.cursor_key(self._consumer, part),
                "lease": lease,
                "channels": list(channels),
                "epoch": epoch,
            },
        )
        if not found:
            return None
        token, snapshot, target, last_id, floor, clean, shed, epoch, at, lost_until, *_ = found[0]
        cursor = Cursor(
            Snapshot.parse(snapshot),
            floor,
            Snapshot.parse(target) if target is not None else None,
            last_id,
        )
        return Claim(part, token, cursor, clean, Told(epoch, shed), at, lost_until)

    def acknowledge(
        self,
        claim: Claim,
        cursor: Cursor,
        count: int,
        lease: float,
        current: bool,
        release: bool = False,
        clean: bool = True,
        progress: Sequence[Progress] = (),
    ) -> tuple[bool, datetime | None]:
        """Keep the cursor and what receivers know of, and renew the lease, or give it up.

        ``current``: all that there was has been acknowledged by now. ``progress`` is kept with it,
        of each backfill once. Returns whether the part is still ours, and until when rows were
        dropped that had not been read, if any were and the receivers do not know.
        """
        notes = {
            f"{name}{number}": value
            for number, each in enumerate(progress)
            for name, value in (
                ("number", each.number),
                ("last_key", None if each.last_key is None else list(each.last_key)),
                ("scanned", each.scanned),
                ("delivered", each.delivered),
                ("finished", each.finished),
            )
        }
        found = self._execute(
            "".join(map(_NOTE.format, range(len(progress)))) + _ACKNOWLEDGE,
            notes
            | {
                "name": self._consumer,
                "part": claim.part,
                "holder": self._holder,
                "token": claim.token,
                "snapshot": str(cursor.snapshot),
                "target": str(cursor.target) if cursor.target is not None else None,
                "last_id": cursor.last_id,
                "floor": cursor.floor,
                "shed": claim.told.shed,
                "epoch": claim.told.epoch,
                "lost_until": claim.told.lost_until,
                "count": count,
                "current": current,
                "lease": lease,
                "release": release,
                "clean": clean,
            },
        )
        if release or not found:
            key = (names.cursor_key(self._consumer, claim.part) + claim.token) % 2147483647
            self._execute("SELECT pg_catalog.pg_advisory_unlock(%s, %s)", (names.CURSOR_CLASS, key))
        return bool(found), found[0][0] if found else None

    def forget(self) -> None:
        """Remove the consumer and its cursor."""
        self._execute("DELETE FROM pgsignals.consumers WHERE name = %s", (self._consumer,))

    def look(self, awake: bool, begin: bool = False) -> Look:
        """What there is by now; unless ``awake`` already, try to be who is.

        With ``begin`` it takes a transaction's id, of which there are so many.
        """
        [(snapshot, given_out, shed, awake, began)] = self._execute(
            "EXECUTE pgsignals_look (%s, %s)", (awake, begin)
        )
        return Look(
            Snapshot.parse(snapshot), given_out, shed, awake, None if began is None else int(began)
        )

    def read(self, window: Window, last_id: int) -> list[Row]:
        """The next rows of a window, by id; none when it is at its end."""
        rows = self._execute(
            "EXECUTE pgsignals_read (%s, %s, %s::bigint[], %s, %s::bigint[])",
            (
                max(window.after, last_id),
                window.since.xmax,
                list(window.ended),
                window.target.xmax,
                list(window.target.running),
            ),
        )
        return [Row(row[0], row[1], self._session.text(row[2])) for row in rows]

    def doze(self) -> None:
        """Let writers send a notification again."""
        self._execute(
            "SELECT pg_catalog.pg_advisory_unlock(%s, %s)", (names.LOCK_CLASS, names.AWAKE_LOCK)
        )

    def wake_others(self) -> None:
        """Tell the other consumers that there may be something."""
        self._execute(f"NOTIFY {WAKE_CHANNEL}, 'awake'")

    def writers_under_way(self) -> bool:
        """Whether a transaction that has written to the outbox goes on."""
        [(found,)] = self._execute(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks"
            " WHERE relation = 'pgsignals.outbox'::pg_catalog.regclass"
            " AND mode = 'RowExclusiveLock' AND granted)"
        )
        return bool(found)

    def members(self, lease: float) -> int:
        """Say that this process is there for ``lease`` seconds more; how many are."""
        self._execute(
            "INSERT INTO pgsignals.members VALUES"
            " (%(name)s, %(holder)s, pg_catalog.clock_timestamp() + %(lease)s * interval '1 s')"
            " ON CONFLICT (name, holder) DO UPDATE SET until = excluded.until",
            {"name": self._consumer, "holder": self._holder, "lease": lease},
        )
        [(count,)] = self._execute(
            "SELECT pg_catalog.count(*) FROM pgsignals.members"
            " WHERE name = %s AND until > pg_catalog.clock_timestamp()",
            (self._consumer,),
        )
        return int(count)

    def leave(self) -> None:
        """Say that this process is there no more."""
        self._execute(
            "DELETE FROM pgsignals.members WHERE name = %s AND holder = %s",
            (self._consumer, self._holder),
        )

    def channels(self) -> list[tuple[int, int, str]]:
        """What the rows of each channel are, and since when."""
        found = self._execute("SELECT channel, since, definition FROM pgsignals.channels")
        return [(channel, since, definition) for channel, since, definition in found]

    def bury(self, letter: Letter) -> None:
        """Keep an event that a receiver could not take."""
        self._execute(
            _BURY,
            {
                "consumer": self._consumer,
                "receiver": letter.receiver,
                "uid": letter.uid,
                "channel": letter.channel,
                "number": letter.number,
                "id": letter.id,
                "payload": letter.payload,
                # A text of PostgreSQL's has no zero bytes.
                "error": letter.error.replace("\0", "\N{REPLACEMENT CHARACTER}"),
                "traceback": letter.traceback.replace("\0", "\N{REPLACEMENT CHARACTER}"),
                "attempts": letter.attempts,
            },
        )

    def wanted_again(self) -> list[DeadLetter]:
        """The dead letters that somebody asked to have delivered again; each is given once."""
        rows = self._execute(
            "UPDATE pgsignals.dead_letters SET retry = false WHERE consumer = %s AND retry"
            " RETURNING id, receiver, channel, number, payload, attempts",
            (self._consumer,),
        )
        return [DeadLetter(*row) for row in sorted(rows)]

    def unbury(self, key: int) -> None:
        """Forget a dead letter, since it has been delivered."""
        self._execute("DELETE FROM pgsignals.dead_letters WHERE id = %s", (key,))
