"""The write-ahead log as one consumer sees it: see Log."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from psycopg2 import errors as pg

from ..consumers.consumer_store import ConsumerStore
from ..consumers.log import Poll, Position
from ..core.errors import DatabaseError
from ..core.logging import log
from ..core.lsn import lsn_text
from ..postgres.session import Session
from ..postgres.snapshot import Snapshot
from ..triggers import names
from ..triggers.names import INSERTS_PUBLICATION, PUBLICATION
from . import slots
from .reader import WalPosition, WalReader, Watermark
from .stream import SLOT_SHARE, PublicationMissing, ReplicationStream

# After a turn that found something, the reader leaves the processor to the writers for so long:
# otherwise each commit would wake it.
PACE_SECONDS = 0.003
# While receivers are behind, the part to wait of the time for which nobody has taken anything.
_STUCK_SHARE = 1 / 8
# How often the server is asked how far the log has come, and sent a sign of life.
LOOK_SECONDS, BEAT_SECONDS = 0.5, 0.5
# The lease of the stream, in leases of the consumer, and at least: a process that hangs for a while
# loses its partition to another long before the server ends its stream. A third of it has to leave
# time for a beat between two statements that take long.
_LEASES, _LEAST_LEASE = 4.0, 10.0
# How long to wait for the slot of a holder that has been ended.
_SLOT_SECONDS = 5.0
# A secret has at most so many digits; what has been found to be none is remembered, up to so many.
_LONGEST_SECRET, _MOST_REFUSED = 19, 1000
# So few that they tell nobody the secret, and another one's are hardly ever the same.
_DIGEST_DIGITS = 4

READ_ONCE = "the temporary replication slot has been read from, or is gone: another one is needed"

_LSN = "({} - '0/0'::pg_catalog.pg_lsn)::pg_catalog.int8"

_LOOK = (
    f"SELECT {_LSN.format('pg_catalog.pg_current_wal_insert_lsn()')},"
    f" {_LSN.format('pg_catalog.pg_current_wal_flush_lsn()')}, s.last_value,"
    " pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text"
    " FROM pgsignals.outbox_shed AS s"
)


class WalLog:
    """The log's messages of triggers, for one consumer, through a replication slot of its own.

    The ``session`` is an ordinary one, which keeps the claim and the position, and asks how far
    the log has come. The messages come through the ``stream``. The position that the server keeps
    for the slot follows the consumer's own: it never goes beyond what has been saved durably, so
    that nothing is skipped after a crash.
    """

    columns: tuple[str, ...] = ("lsn", "commit_lsn", "messages", "target")
    missed = "c.lsn < %(made)s"
    # A message is gone from the log for us once it is acknowledged.
    messages = "(SELECT NULL::bigint AS id, NULL::text AS payload WHERE false)"
    marking = Watermark.SQL
    own = "lsn IS NOT NULL"

    def __init__(
        self,
        session: Session,
        stream: ReplicationStream,
        consumer: str,
        holder: str,
        timeout: float,
        *,
        slot: str,
        temporary: bool,
        lease: float,
    ) -> None:
        self._session = session
        self._stream = stream
        self._timeout = timeout
        self._slot = slot
        self._temporary = temporary
        # Whether this session has made the slot.
        self._made = False
        self._lease = max(_LEASES * lease, _LEAST_LEASE)
        self.start: Mapping[str, str] = {
            # Not where the slot begins, which a consumer of the same name may have left behind.
            "lsn": _LSN.format("pg_catalog.pg_current_wal_insert_lsn()"),
            "commit_lsn": "0",
            "messages": "0",
            "shed": "(SELECT last_value FROM pgsignals.outbox_shed)",
        }
        self.consumer = ConsumerStore(session, self, consumer, holder, timeout)
        self._reader: WalReader | None = None
        # Where the slot begins that was made for a consumer who comes from another log.
        self._kept: int | None = None
        # Whether the consumer goes to another log, and where reading ends then.
        self._leaving = False
        self._until: Watermark | None = None
        # The tables whose rows somebody reads, by their OIDs.
        self.wanted: Collection[int] = ()
        # Called when rows of a table begin to come that nobody reads as far as is known.
        self.unknown: Callable[[], None] = lambda: None
        # A transaction id of the present.
        self._xmax = 0
        # The secret, former ones, and what has been taken for one and is none.
        self._secrets: set[bytes] = set()
        # The digest of the secret with which this session began.
        self._began_with = ""
        self._no_secrets: set[bytes] = set()
        self._forged = 0
        # Called for each message that no trigger of ours has written.
        self.refuse: Callable[[], None] = lambda: None
        self._shed = 0
        # The log's end at the latest look, and when that was; everything before has been read by
        # ``_as_of``.
        self._end, self._looked_at = 0, 0.0
        self._as_of: float | None = None
        # Saved positions, each with the log's end when it had been saved, and the latest position,
        # whose end the next look gives: a statement for each would hold up reading.
        self._saved: deque[tuple[int, int]] = deque()
        self._just_saved = 0
        self._beat_at = 0.0
        self._busy = False
        # How often what was read has been taken, and when that was noticed.
        self._turns, self._turned_at = 0, 0.0

    def _execute(self, statement: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        return self._session.execute(statement, parameters, timeout=self._timeout)

    def open(self) -> None:
        # Positions may be lost in a crash of the server: the slot keeps the messages until the
        # position is known to be on disk.
        self._execute("SET synchronous_commit TO off")
        self._execute(
            "SELECT pg_catalog.pg_advisory_lock_shared(%s, %s)",
            (names.LOCK_CLASS, names.ALIVE_LOCK),
        )
        self._begin_with_secret()
        # A slot that is read without it is stuck: see _give_up_slot.
        self._require_publications()
        self._prepare_slot()

    def _prepare_slot(self) -> None:
        if self._temporary:
            self._start_stream(0)
        else:
            self._make_slot(self._slot)

    def _begin_with_secret(self) -> None:
        self._read_secret()
        digest = hashlib.sha256(b"".join(self._secrets)).hexdigest()
        self._began_with = digest[:_DIGEST_DIGITS]

    def _read_secret(self) -> None:
        # A sequence without a value shows its first one, which anybody can guess.
        for (secret,) in self._execute(
            "SELECT last_value FROM pgsignals.wal_secret WHERE is_called"
        ):
            self._secrets.add(str(secret).encode())

    def surroundings(self) -> tuple[str, datetime]:
        """See Log.

        The OID of the consumers' table is part of the history: a restore over the database makes it
        anew. So is the secret that this session began with: one that comes later does not know what
        triggers have written with another.
        """
        [(cluster, database, made, timeline, clock)] = self._execute(
            "SELECT system_identifier, d.oid, 'pgsignals.consumers'::pg_catalog.regclass::oid,"
            " pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8),"
            " pg_catalog.clock_timestamp()"
            " FROM pg_catalog.pg_control_system(), pg_catalog.pg_database AS d"
            " WHERE d.datname = pg_catalog.current_database()"
        )
        name = f"{cluster}-{database}-{made}-{self._began_with}-wal"
        return f"{name}/{int(timeline, 16)}", clock

    def poll(self) -> Poll:
        reader = self._reader
        now = time.monotonic()
        mark = None
        if reader is not None:
            if self._leaving:
                mark = self._until or self._mark()
            reader.fill()
            self._busy = self._busy or not reader.at_end or (self._leaving and reader.waits)
            self._keep_up(reader, now)
        elif now - self._looked_at >= LOOK_SECONDS:
            self._look()
        return Poll(mark or Watermark(self._end), self._shed, self._as_of)

    def _mark(self) -> Watermark:
        [(text,)] = self._execute(f"SELECT {self.marking}")
        return Watermark.parse(text)

    def _look(self) -> int:
        """Ask how far the log has come; return up to where it is on disk."""
        at = time.monotonic()
        [(self._end, flushed, self._shed, xmax)] = self._execute(_LOOK)
        self._looked_at, self._xmax = at, int(xmax)
        if self._just_saved:
            self._saved.append((self._just_saved, self._end))
            self._just_saved = 0
        return int(flushed)

    def _keep_up(self, reader: WalReader, now: float) -> None:
        """Note what has been read, tell the server what is saved, and that we live."""
        if now - self._looked_at >= LOOK_SECONDS:
            flushed = self._look()
            while self._saved and self._saved[0][1] <= flushed:
                self._stream.confirm(self._saved.popleft()[0])
        if reader.covers(Watermark(self._end)):
            self._as_of = self._looked_at
        if (between := reader.between) is not None:
            reader.rest(between)
        self._beat(now)

    def _beat(self, now: float) -> None:
        if now - self._beat_at >= BEAT_SECONDS:
            self._stream.beat()
            self._beat_at = now

    def latest(self) -> Watermark:
        self._look()
        return Watermark(self._end)

    def acknowledged(self, position: Position) -> None:
        assert isinstance(position, WalPosition)
        assert self._reader is not None
        if position.lsn > self._reader.position.lsn:
            # It is of another history, in which the log had come further.
            return
        if not self._saved or position.lsn > self._saved[-1][0]:
            self._just_saved = max(self._just_saved, position.lsn)

    def pause(self, worked: float) -> float:
        busy, self._busy = self._busy, False
        self._stream.listen(not busy)
        now, turns = time.monotonic(), 0 if self._reader is None else self._reader.turns
        if not busy or self._turns != turns:
            self._turns, self._turned_at = turns, now
        if not busy:
            return LOOK_SECONDS
        # Nobody takes what has been read: the longer that lasts, the longer are the pauses.
        return max(PACE_SECONDS, min(_STUCK_SHARE * (now - self._turned_at), LOOK_SECONDS))

    def wake(self) -> None: ...

    def stir(self) -> None: ...

    def writers(self) -> int:
        """The id of a transaction of ours: writers that are under way have lower ids."""
        [(began,)] = self._execute("SELECT pg_catalog.pg_current_xact_id()::text")
        return int(began)

    def have_ended(self, writers: int, watermark: Watermark | None = None) -> bool:
        if watermark is not None and watermark.snapshot is not None:
            return watermark.snapshot.xmin > writers
        [(oldest,)] = self._execute(
            "SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text"
        )
        return int(oldest) > writers

    def position(self, columns: Mapping[str, Any]) -> WalPosition:
        lsn, commit_lsn, messages, since = (columns[each] for each in self.columns)
        return WalPosition(
            lsn or 0,
            commit_lsn or 0,
            messages or 0,
            None if since is None else Watermark.parse(since),
        )

    def watermark(self, text: str) -> Watermark:
        return Watermark.parse(text)

    def reader(self, position: Position, clean: bool) -> WalReader:
        """Begin to read from a position on; the claim must be ours.

        The slot of a former holder that hangs is taken from it, by ending its session.
        """
        assert isinstance(position, WalPosition)
        if self._temporary and self._reader is not None:
            # What the stream has given once, it does not give again.
            raise DatabaseError(READ_ONCE)
        self._saved.clear()
        self._just_saved = 0
        self._look()
        self._as_of = None
        ahead = position.lsn > self._end
        begin, lost = self._begin_at(position)
        if not self._temporary:
            self._open_stream(begin)
        # Only now: a former holder that does not know of its end read on until its stream ended.
        self._look()
        found = WalReader(
            self._messages,
            lambda: self._stream.received,
            self._wait,
            self._is_secret,
            self._note_forged,
            self._wants,
            self._txid,
            self._session.codec,
            WalPosition(begin) if ahead else replace(position, lsn=begin),
            self._end,
            clean=clean,
            lost=lost,
            ahead=ahead,
        )
        if self._leaving:
            found.read_to(self._mark())
        if self._until is not None:
            found.end(self._until)
        self._reader = found
        self._beat_at = time.monotonic()
        return found

    def _begin_at(self, position: WalPosition) -> tuple[int, str]:
        """Return the LSN to begin at, and why what lies before it is lost, if it is."""
        slot = slots.look(self._execute, self._slot)
        if slot is None and self._temporary:
            raise DatabaseError(READ_ONCE)
        if slot is None:
            return self._make_slot(self._slot), (
                f"the replication slot {self._slot} had been removed"
            )
        if slot.invalidation:
            why = f"the server has given up the replication slot {self._slot}: {slot.invalidation}"
            # Now: making another one may take more than one try, and then nobody knows any more.
            log.error("%s; making another one", why)
            slots.drop(self._execute, self._slot)
            return self._make_slot(self._slot), why
        slots.require_ours(slot)
        confirmed = self._make_slot(slot.name) if slot.confirmed is None else slot.confirmed
        if confirmed > position.lsn:
            since = (
                f"begins at {lsn_text(confirmed)}, and {lsn_text(position.lsn)} had been "
                "acknowledged"
            )
            if self._temporary:
                return confirmed, (
                    f"a process without a name has a slot for each of its connections: this one "
                    f"{since}"
                )
            if self._made:
                why = "was not there any more, and has been made anew"
                return confirmed, f"the replication slot {self._slot} {why}: it {since}"
            return confirmed, (
                f"the replication slot {self._slot} {since}: somebody has moved it, or made it anew"
            )
        # In a history that has gone back, nothing would come until the log is where it was.
        return (confirmed if position.lsn > self._end else position.lsn), ""

    def _make_slot(self, name: str, *, failover: bool = True) -> int:
        """Make a slot, unless it is there; return from where on it gives what is committed.

        Another process may be making it.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            slot = slots.look(self._execute, name)
            if slot is None:
                with contextlib.suppress(pg.DuplicateObject):
                    made = slots.create(
                        self._execute,
                        name,
                        self._session.server_version,
                        SLOT_SHARE * self._timeout,
                        failover=failover,
                    )
                    self._made = True
                    log.info("made the replication slot %s for %s", name, self.consumer.name)
                    return made
                continue
            slots.require_ours(slot)
            if slot.confirmed is not None:
                return slot.confirmed
            if time.monotonic() >= deadline:
                raise DatabaseError(
                    f"The replication slot {name!r} is being made by the process "
                    f"{slot.active_pid} of the server, and waits for transactions: "
                    f"{slots.in_the_way(self._execute)}."
                )
            self._session.waiter.sleep(0.05, self._session.cancelled)

    def _open_stream(self, begin: int) -> None:
        self._stream.close()
        self._free_slot()
        self._start_stream(begin)

    def _free_slot(self) -> None:
        """End whoever reads from the slot, and wait for that."""
        deadline = time.monotonic() + _SLOT_SECONDS
        while True:
            slot = slots.look(self._execute, self._slot)
            if slot is None or slot.active_pid is None or time.monotonic() >= deadline:
                break
            slots.end_holder(self._execute, slot)
            self._session.waiter.sleep(0.02, self._session.cancelled)

    def _start_stream(self, begin: int, copied: str = "") -> None:
        self._stream.open(
            self._slot,
            [PUBLICATION, INSERTS_PUBLICATION],
            begin,
            self._lease,
            self._timeout,
            temporary=self._temporary,
            copied=copied,
        )

    def _wants(self, relation: int, new: bool) -> bool:
        """Whether somebody reads a table's rows; ask again if it is a ``new`` one."""
        if new and relation not in self.wanted:
            # Somebody may have made our watcher anew, for another table of the name.
            self.unknown()
        return relation in self.wanted

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        try:
            yield from self._stream.messages()
        except PublicationMissing as error:
            self._give_up_slot(error)
            raise

    def _require_publications(self) -> None:
        there = "SELECT pubname FROM pg_catalog.pg_publication WHERE pubname = ANY (%s)"
        names = [PUBLICATION, INSERTS_PUBLICATION]
        missing = {*names} - {name for (name,) in self._execute(there, (names,))}
        if missing:
            raise DatabaseError(
                f"The publication {min(missing)!r} is missing: run `pgsignals install --delivery "
                "wal`, or have its owner do so."
            )

    def _give_up_slot(self, error: PublicationMissing) -> None:
        """Drop the slot, if another one would do better; connecting again makes it, with a Gap.

        Somebody has dropped the publication and made it again. Up to PostgreSQL 17, nothing brings
        the slot past the time between.
        """
        self._stream.close()
        self._require_publications()
        if not self._temporary:
            log.error("dropping the replication slot %s, which is stuck: %s", self._slot, error)
            self._free_slot()
            slots.drop(self._execute, self._slot)

    def _wait(self) -> None:
        self._stream.listen(True)
        self._session.wait(PACE_SECONDS)

    def _is_secret(self, text: bytes) -> bool:
        if text in self._secrets:
            return True
        if text in self._no_secrets or len(text) > _LONGEST_SECRET or not text.isdigit():
            return False
        # Somebody may have set another one meanwhile. Anybody may have us ask, for a whole page of
        # messages, which must not cost the lease.
        self._read_secret()
        self._beat(time.monotonic())
        if text in self._secrets:
            return True
        if len(self._no_secrets) >= _MOST_REFUSED:
            self._no_secrets.clear()
        self._no_secrets.add(text)
        return False

    def _note_forged(self, lsn: int) -> None:
        self._forged += 1
        self.refuse()
        if self._forged == 1:
            log.warning(
                "ignoring messages in the write-ahead log that none of our triggers has written; "
                "the first is at %s",
                lsn_text(lsn),
            )

    def _txid(self, xid: int) -> int:
        """Return a transaction's id from its last 32 bits: it is near those of the present."""
        distance = (xid - self._xmax) & 0xFFFFFFFF
        return self._xmax + distance - (1 << 32 if distance >= 1 << 31 else 0)

    @property
    def encoding(self) -> str:
        """The database's, in Python's terms."""
        return self._session.codec

    def shed_detail(self, count: int) -> str:
        return (
            f"{count} statements could not write their messages: their triggers lacked a right, or "
            "the secret had no value"
        )

    def keep(self) -> None:
        """See MovableLog: by the slot, of which nothing has been read yet."""
        self._begin_with_secret()
        self._require_publications()
        slot = slots.look(self._execute, self._slot)
        if slot is not None and slot.invalidation:
            slots.drop(self._execute, self._slot)
        self._kept = self._make_slot(self._slot)

    def keeps(self) -> bool:
        slot = slots.look(self._execute, self._slot)
        return slot is not None and not slot.invalidation and slot.confirmed == self._kept

    def behind(self, snapshot: Snapshot) -> WalPosition:
        assert self._kept is not None
        # What the snapshot sees has committed below.
        self._look()
        return WalPosition(self._kept, since=Watermark(self._end, snapshot))

    def leave(self) -> None:
        """See MovableLog.

        From now on only what some snapshot sees is read, so that the one of the ``end`` sees all
        that has been read: a commit is in the log before others see it.
        """
        self._leaving = True

    def end(self) -> Watermark:
        self._until = self._mark()
        if self._reader is not None:
            self._reader.end(self._until)
        return self._until

    def seen(self, position: Position) -> Snapshot:
        assert self._until is not None
        assert self._until.snapshot is not None
        return self._until.snapshot

    def forsake(self) -> None:
        self._stream.close()
        self._free_slot()
        slots.drop(self._execute, self._slot)
        log.info("dropped the replication slot %s", self._slot)

    def left(self) -> None:
        # The slot is the next holder's, and what the stream gets would wake us for nothing.
        self._stream.close()

    def close(self) -> None:
        self._stream.close()

    def abandon(self) -> None:
        self._stream.abandon()
