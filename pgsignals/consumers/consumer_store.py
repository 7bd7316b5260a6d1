"""The statements that keep a consumer in the database: its claims, members and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from ..postgres.session import Session
from ..triggers import names
from .log import Log, Position
from .parking_store import Late, parking_statement, parking_values


@dataclass(frozen=True)
class Announced:
    """The losses that a consumer's receivers know of; later ones have yet to be announced.

    ``epoch`` names the log's history, ``shed`` counts what writers could not write to the log, and
    until ``lost_until`` rows were dropped before they were read.
    """

    epoch: str
    shed: int
    lost_until: datetime | None = None


@dataclass(frozen=True)
class Claim:
    """The right to read a partition from a ``position`` on, and what is known of its past.

    ``token`` counts the claims, so that a former holder's acknowledgement is refused. ``clean``:
    the former holder had acknowledged all that it delivered. ``lost_until`` is as in Announced, of
    a loss that had not been announced when the claim was made.
    """

    part: int
    token: int
    position: Position
    clean: bool
    announced: Announced
    acknowledged_at: datetime
    lost_until: datetime | None


@dataclass(frozen=True)
class Beat:
    """A sign of life of a process, whose ``number`` changes within ``lease`` seconds.

    ``server`` names the run of the server: a crash may take the latest beats back.
    """

    token: int
    number: int
    lease: float
    server: str


@dataclass(frozen=True)
class Channels:
    """The channels that a process reads for a consumer.

    ``own`` are those of its triggers, which were last made at the id ``made``. ``unreadable`` are
    those of another version, whose descriptions this one does not understand.
    """

    own: Sequence[int]
    made: int
    unreadable: Sequence[int]


@dataclass(frozen=True)
class Progress:
    """The progress of a backfill by one page; ``size`` is the page's, in bytes.

    The page went through ``scanned`` rows, up to the one of ``last_key``, of which ``delivered``
    became events; ``finished``: there are no more rows.
    """

    number: int
    last_key: list[str] | None
    scanned: int
    finished: bool
    size: int
    delivered: int = 0

    def then(self, later: Progress) -> Progress:
        """Return both as one."""
        return replace(
            later,
            last_key=later.last_key or self.last_key,
            scanned=self.scanned + later.scanned,
            delivered=self.delivered + later.delivered,
        )


# Whether the session of a member lives, which holds the member's lock.
LIVES = f"""EXISTS (
  SELECT FROM pg_catalog.pg_locks AS l
  WHERE l.locktype = 'advisory' AND l.classid = {names.MEMBER_CLASS} AND l.objid = m.key::oid
    AND l.objsubid = 2 AND l.granted AND l.database =
      (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))"""

# The name of a run of the server. The postmaster's start alone would not do: a crash that it
# survives resets the statistics.
_SERVER = """pg_catalog.concat(
  extract(epoch FROM pg_catalog.pg_postmaster_start_time()), '/',
  (SELECT extract(epoch FROM stats_reset) FROM pg_catalog.pg_stat_bgwriter))"""

# No clock decides here, since clocks may be set back and forward. A holder's session has the lock
# of its claim, whose key counts up with the token. Once that lock is free, the holder has ended,
# unless the server ended the session (by a restart, say), or this is another server: then the
# holder may not know yet, and delivers until its lease is over. The lease is over when the process
# that asks has itself seen the same beat for so long.
# A claim, unlike an acknowledgement, must outlive a crash of the server. Otherwise, where the
# former holder had left the partition clean, nobody would know what the new one has delivered.
_CLAIM = f"""
WITH free AS MATERIALIZED (
  SELECT name, part FROM pgsignals.consumers
  WHERE name = %(name)s AND part = %(part)s AND {{own}}
    AND (holder IS NULL OR holder = %(holder)s
         OR (token = %(still_token)s AND beat = %(still_beat)s)
         OR (epoch = %(epoch)s AND server = {_SERVER}
             AND pg_catalog.pg_try_advisory_xact_lock(
               %(class)s, ((%(key)s::bigint + token) %% 2147483647)::int)))
  FOR UPDATE
)
UPDATE pgsignals.consumers AS c
SET holder = %(holder)s, token = c.token + 1, clean = false, channels = %(channels)s,
    beat = c.beat + 1, lease = %(lease)s, server = {_SERVER},
    -- What only triggers wrote that a newer version had in place of ours is for it alone to read.
    lost_until = CASE WHEN former.channels && %(unreadable)s::bigint[] AND {{missed}}
                      THEN pg_catalog.clock_timestamp() ELSE c.lost_until END
FROM free, pgsignals.consumers AS former
WHERE c.name = free.name AND c.part = free.part
  AND former.name = free.name AND former.part = free.part
RETURNING c.token, former.clean, c.epoch, c.shed,
          -- Marked by a former holder, who acknowledged on without a look at what writers left out.
          CASE WHEN c.installation = '' THEN least(c.acknowledged_at, c.verified_at)
               ELSE c.acknowledged_at END,
          c.lost_until, former.channels,
          {{columns}},
          pg_catalog.pg_try_advisory_lock(
            %(class)s, ((%(key)s::bigint + c.token) %% 2147483647)::int),
          pg_catalog.set_config('synchronous_commit', 'on', true)
"""

_REGISTER = """
INSERT INTO pgsignals.consumers
  (name, part, parts, ephemeral, {columns}, epoch, channels, acknowledged_at, lost_until)
SELECT %(name)s, part, %(parts)s, %(ephemeral)s, {values}, %(epoch)s, %(channels)s,
       coalesce(%(since)s::timestamptz, pg_catalog.clock_timestamp()),
       CASE WHEN %(since)s::timestamptz IS NOT NULL THEN pg_catalog.clock_timestamp() END
FROM pg_catalog.generate_series(0, %(parts)s - 1) AS part
ON CONFLICT (name, part) DO NOTHING
"""

# ``acknowledged_at`` stays while a loss has yet to be announced, since the Gap begins there.
_ACKNOWLEDGE = """
UPDATE pgsignals.consumers AS c
SET {columns}, shed = %(shed)s, epoch = %(epoch)s,
    acknowledged = c.acknowledged + %(count)s,
    acknowledged_at = CASE WHEN %(age)s IS NOT NULL AND (c.lost_until IS NULL
                                OR c.lost_until <= %(lost_until)s::timestamptz)
                           THEN pg_catalog.clock_timestamp() - %(age)s::float8 * interval '1 second'
                           ELSE c.acknowledged_at END,
    lost_until = CASE WHEN c.lost_until <= %(lost_until)s::timestamptz THEN NULL
                      ELSE c.lost_until END,
    holder = CASE WHEN %(release)s THEN NULL ELSE c.holder END,
    clean = %(release)s AND %(clean)s,
    beat = c.beat + 1
WHERE c.name = %(name)s AND c.part = %(part)s AND c.holder = %(holder)s AND c.token = %(token)s
RETURNING c.lost_until, c.acknowledged_at
"""

# Sent with an acknowledgement in one message, so that the transaction ends in the server: a process
# that hangs then does not keep its successor from the row. The token keeps it from writing over
# what the successor has noted.
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


def claim_key(consumer: str, part: int, token: int) -> int:
    """Return the key of the lock that the session of a claim's holder has."""
    return (names.cursor_key(consumer, part) + token) % 2147483647


class ConsumerStore:
    """The rows of one consumer of a log, through the session of the thread that reads."""

    def __init__(
        self, session: Session, log: Log, consumer: str, holder: str, timeout: float
    ) -> None:
        self.session = session
        self.log = log
        self.name = consumer
        self.timeout = timeout
        self._holder = holder
        self._joined = False
        columns = log.columns
        self._claim = _CLAIM.format(
            own=log.own, missed=log.missed, columns=", ".join(f"c.{each}" for each in columns)
        )
        self._register = _REGISTER.format(
            columns=", ".join(log.start), values=", ".join(log.start.values())
        )
        self._acknowledge = _ACKNOWLEDGE.format(
            columns=", ".join(f"{each} = %({each})s" for each in columns)
        )
        self._park = parking_statement(log.messages)

    def execute(self, statement: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        """Run a statement."""
        return self.session.execute(statement, parameters, timeout=self.timeout)

    def register(
        self,
        parts: int,
        ephemeral: bool,
        epoch: str,
        channels: Sequence[int],
        since: datetime | None = None,
    ) -> tuple[int, bool]:
        """Register the consumer from now on; return its partitions' number, and whether it is new.

        With ``since``, the consumer was known before, and everything until then was acknowledged;
        if it is new all the same, it had been removed, and what came after that is noted as lost.
        """
        added = self.execute(
            self._register + " RETURNING part",
            {
                "name": self.name,
                "parts": parts,
                "ephemeral": ephemeral,
                "epoch": epoch,
                "channels": list(channels),
                "since": since,
            },
        )
        [(present,)] = self.execute(
            "SELECT parts FROM pgsignals.consumers WHERE name = %s AND part = 0", (self.name,)
        )
        return int(present), bool(added)

    def beats(self) -> dict[int, Beat]:
        """Return the latest beat of each partition's holder, where it has one."""
        return {
            part: Beat(*beat)
            for part, *beat in self.execute(
                f"SELECT part, token, beat, lease, {_SERVER} FROM pgsignals.consumers"
                " WHERE name = %s AND holder IS NOT NULL",
                (self.name,),
            )
        }

    def claim(
        self,
        part: int,
        lease: float,
        channels: Channels,
        epoch: str,
        still: Beat | None = None,
    ) -> Claim | None:
        """Claim a partition for ``lease`` seconds; None while another process holds it.

        A holder is gone whose beat is ``still`` that of a lease ago; so is, in the same history and
        run of the server, one whose session has ended.

        Where the former holder was in the middle of a window that it read through other triggers,
        its position says nothing of what ours have written: the window is read from its beginning.
        """
        found = self.execute(
            self._claim,
            {
                "name": self.name,
                "part": part,
                "holder": self._holder,
                "class": names.CURSOR_CLASS,
                "key": names.cursor_key(self.name, part),
                "lease": lease,
                "channels": list(channels.own),
                "made": channels.made,
                "unreadable": list(channels.unreadable),
                "epoch": epoch,
                "still_token": None if still is None else still.token,
                "still_beat": None if still is None else still.number,
            },
        )
        if not found:
            return None
        [(token, clean, epoch, shed, at, lost_until, former, *kept)] = found
        position = self.log.position(dict(zip(self.log.columns, kept, strict=False)))
        if set(former) != set(channels.own) and position.whole != position:
            position, clean = position.whole, False
        return Claim(part, token, position, clean, Announced(epoch, shed), at, lost_until)

    def acknowledge(
        self,
        claim: Claim,
        position: Position,
        count: int,
        age: float | None,
        release: bool = False,
        clean: bool = True,
        progress: Sequence[Progress] = (),
        late: Sequence[Late] = (),
    ) -> tuple[datetime, datetime | None] | None:
        """Save the position and the announced losses; renew the claim, or ``release`` it.

        ``age``: everything that the log had so many seconds ago is acknowledged. ``progress`` is
        saved in the same transaction, once for each backfill, and ``late`` parked for single
        receivers. Returns None if the partition is not ours any more; otherwise the time up to
        which everything is acknowledged, and the time until which unread rows were dropped, None
        without such a loss that has yet to be announced.
        """
        notes = {
            f"{name}{number}": value
            for number, each in enumerate(progress)
            for name, value in vars(each).items()
        }
        found = self.execute(
            "".join(map(_NOTE.format, range(len(progress))))
            + (self._park if late else "")
            + self._acknowledge,
            notes
            | parking_values(late, self.session.given)
            | dict(position.columns)
            | vars(claim.announced)
            | {
                "name": self.name,
                "part": claim.part,
                "holder": self._holder,
                "token": claim.token,
                "count": count,
                "age": age,
                "release": release,
                "clean": clean,
            },
        )
        if release or not found:
            # Also the lock of a claim that is lost, which the session would keep until its end.
            key = claim_key(self.name, claim.part, claim.token)
            self.execute("SELECT pg_catalog.pg_advisory_unlock(%s, %s)", (names.CURSOR_CLASS, key))
        return (found[0][1], found[0][0]) if found else None

    def hand_over(
        self,
        claim: Claim,
        target: Log,
        position: Position,
        epoch: str,
        channels: Sequence[int],
        installation: str,
    ) -> bool:
        """Have the consumer, claimed and all acknowledged, go on in another log, for anybody.

        Its ``channels`` there have the triggers of the fingerprint ``installation``. Returns False
        if the claim is lost, or a loss has to be announced first.
        """
        # Unlike an acknowledgement, it must outlive a crash of the server: by then the triggers of
        # this log may be gone.
        former = [each for each in self.log.columns if each not in target.columns]
        found = self.execute(
            "UPDATE pgsignals.consumers SET"
            f" {', '.join(f'{each} = DEFAULT' for each in former)},"
            f" {', '.join(f'{each} = %({each})s' for each in target.columns)},"
            " epoch = %(epoch)s, channels = %(channels)s, installation = %(installation)s,"
            " verified_at = pg_catalog.clock_timestamp(), clean = true,"
            " holder = NULL, token = token + 1, beat = beat + 1"
            " WHERE name = %(name)s AND part = %(part)s AND holder = %(holder)s"
            " AND token = %(token)s AND lost_until IS NULL AND installation IS DISTINCT FROM ''"
            " RETURNING pg_catalog.set_config('synchronous_commit', 'on', true)",
            dict(position.columns)
            | {
                "epoch": epoch,
                "channels": list(channels),
                "installation": installation,
                "name": self.name,
                "part": claim.part,
                "holder": self._holder,
                "token": claim.token,
            },
        )
        return bool(found)

    def elsewhere(self) -> bool:
        """Whether the consumer has its position in another log."""
        return bool(
            self.execute(
                "SELECT 1 FROM pgsignals.consumers WHERE name = %s AND part = 0"
                f" AND NOT ({self.log.own})",
                (self.name,),
            )
        )

    def mark_lost(self) -> datetime:
        """Note that events have been dropped before they were read; return until when."""
        [(until,)] = self.execute(
            "WITH now AS (SELECT pg_catalog.clock_timestamp() AS at)"
            " UPDATE pgsignals.consumers SET lost_until = at FROM now WHERE name = %s"
            " RETURNING lost_until",
            (self.name,),
        )[:1]
        assert isinstance(until, datetime)
        return until

    def forget(self) -> None:
        """Remove the consumer."""
        self.execute("DELETE FROM pgsignals.consumers WHERE name = %s", (self.name,))

    def members(self, lease: float) -> dict[str, Beat]:
        """Say that this process shares the partitions; return the beats of all live members."""
        key = names.member_key(self.name, self._holder)
        if not self._joined:
            # Before the row is inserted: housekeeping removes a row whose lock nobody holds.
            self.execute(
                "SELECT pg_catalog.pg_advisory_lock_shared(%s, %s)", (names.MEMBER_CLASS, key)
            )
            self._joined = True
        self.execute(
            "INSERT INTO pgsignals.members AS m (name, holder, key, lease)"
            " VALUES (%(name)s, %(holder)s, %(key)s, %(lease)s)"
            " ON CONFLICT (name, holder) DO UPDATE SET beat = m.beat + 1",
            {"name": self.name, "holder": self._holder, "key": key, "lease": lease},
        )
        found = self.execute(
            f"SELECT holder, 0, beat, lease, {_SERVER} FROM pgsignals.members AS m"
            f" WHERE name = %s AND {LIVES}",
            (self.name,),
        )
        return {holder: Beat(*beat) for holder, *beat in found}

    def leave(self) -> None:
        """Say that this process does not share the partitions any more."""
        self.execute(
            "DELETE FROM pgsignals.members WHERE name = %s AND holder = %s",
            (self.name, self._holder),
        )
