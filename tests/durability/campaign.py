"""Rounds of writing and suffering, each with a verdict."""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import psycopg2
from psycopg2.extensions import cursor as Cursor

from pgsignals.testing import Server
from tests.paths import ROOT
from tests.proxy import Proxy
from tests.standby import Standby

from .changes import CHANGES, OWNER, ROLES, SUPERUSER, WRITER, Changes
from .child import FAILPOINTS, MOVE_FAILPOINTS, RELAY_FAILPOINTS, WAL_FAILPOINTS, Orders
from .destination import BROKER_FAULTS, DESTINATIONS, Destination
from .ledger import Announced, Delivery, Note, Reader
from .verdict import Book, Version
from .writers import SCHEMA, Board, Writers, write_one

log = logging.getLogger("durability")

SERVER_SETTINGS = {
    # A commit that its writer or a reader has seen must outlive an immediate shutdown.
    "synchronous_commit": "on",
    # By it, what was lost is known to have been announced.
    "track_commit_timestamp": "on",
    "max_connections": "60",
    "checkpoint_timeout": "30s",
    "restart_after_crash": "on",
    # A connection that a black hole holds before it has said anything keeps even a fast shutdown
    # waiting for so long.
    "authentication_timeout": "5s",
    # Standbys and proxies that are cut fill the log otherwise.
    "log_min_messages": "warning",
}

LEASE = 1.0
PATIENCE = 1.5
# How soon a consumer notices that somebody has changed its triggers.
HEARTBEAT = 0.5
# Within which all that is committed must have been delivered and acknowledged, after a round.
DRAIN_SECONDS = 60.0
# A broker that was killed looks through its files before it takes anything.
BROKER_DRAIN_SECONDS = 150.0
_MOST_SHOWN = 5
# How long a broker is away at most.
OUTAGE_SECONDS = 5.0

# Of the write-ahead log, beside those.
LOGICAL_SETTINGS = {"wal_level": "logical", "max_slot_wal_keep_size": "10GB"}

FAULTS = (
    "kill -9",
    "SIGTERM",
    "SIGSTOP",
    "cut",
    "black hole",
    "restart fast",
    "restart immediate",
)


# What happens to replication slots.
SLOT_FAULTS = ("slot dropped", "slot advanced", "slot made anew")
# A standby comes to the address of the server, and is promoted. It is made before a round.
PROMOTION = "promotion"
_STANDBY_SHARE = 0.3

# A consumer goes from one delivery to the other, and back: its processes end, in whatever way, and
# are started with the other delivery.
MOVE = "delivery changed"


@dataclass(frozen=True)
class ConsumerPlan:
    """A consumer: its name, in how many parts, by how many processes with how many workers.

    It installs as the table's owner, and reads as ``role``.
    """

    name: str
    partitions: int
    processes: int
    workers: int
    role: str = SUPERUSER


CONSUMERS = (
    ConsumerPlan("one active", 1, 2, 1, OWNER),
    ConsumerPlan("shared", 3, 2, 2),
)
# The write-ahead log is not read in partitions.
WAL_CONSUMERS = (
    ConsumerPlan("one active", 1, 2, 1, OWNER),
    ConsumerPlan("workers", 1, 2, 2),
)
# With a broker at the end: its cursor is the consumer "relay/kafka" or "relay/nats".
RELAYS = (ConsumerPlan("relay", 1, 2, 1),)


@dataclass
class Outcome:
    """What a campaign came to: ``problems`` is empty if all held."""

    rounds: int = 0
    committed: int = 0
    delivered: int = 0
    redelivered: int = 0
    unmarked: int = 0
    announced: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    transactions: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class _Child:
    """A process of a consumer with the proxy it connects through; started again when it ends."""

    def __init__(self, campaign: Campaign, plan: ConsumerPlan, number: int) -> None:
        self.plan = plan
        self.number = number
        self.proxy = Proxy("127.0.0.1", campaign.server.port)
        self.proxy.__enter__()
        self.stopped_until: float | None = None
        self.stalled_until: float | None = None
        self.restart_at: float | None = 0.0
        self._campaign = campaign
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, failpoint: str, countdown: int) -> None:
        """Start, to die at a failpoint if one is given."""
        campaign = self._campaign
        direct, through = f":{campaign.server.port}/", f":{self.proxy.port}/"
        orders = Orders(
            dsn=campaign.dsns[OWNER].replace(direct, through),
            listen_dsn=campaign.dsns[self.plan.role].replace(direct, through),
            ledger=str(campaign.ledger),
            consumer=self.plan.name,
            partitions=self.plan.partitions,
            workers=self.plan.workers,
            lease=LEASE,
            patience=PATIENCE,
            heartbeat=HEARTBEAT,
            failpoint=failpoint,
            countdown=countdown,
            mutant=campaign.mutant,
            flaky=0.002,
            backend=campaign.destination.url if campaign.destination else "",
            pace=campaign.pace,
            delivery=campaign.deliveries[self.plan.name],
        )
        with campaign.log_path.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.durability.child", json.dumps(asdict(orders))],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
            )
        self.restart_at = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if there is a process."""
        if self._process is not None:
            self._process.send_signal(number)

    def reap(self) -> int | None:
        """The exit code, once, of a process that has ended."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        self._process = None
        return code

    def heal(self) -> None:
        """End what it suffers."""
        if self.stopped_until is not None:
            self.signal(signal.SIGCONT)
            self.stopped_until = None
        if self.stalled_until is not None:
            self.proxy.resume()
            self.stalled_until = None

    def end(self) -> None:
        """Kill it and close the proxy."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.proxy.refuse()
        self.proxy.cut()


class Campaign:
    """A server, its consumers and the ledger, over any number of rounds.

    ``folder`` gets the ledger and the children's log. ``faults`` are injected, by default all that
    there are; ``hear`` seconds after a round something must arrive, and all ``drain`` seconds after
    that. ``version`` is PostgreSQL's.
    With ``to``, the consumers are relays to such a broker, which is away for ``outage`` seconds at
    most, and what it has at the end is judged too. A receiver takes ``pace`` seconds.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        seconds: float = 4.0,
        writers: int = 8,
        faults: Sequence[str] | None = None,
        version: int | None = None,
        mutant: str = "",
        drain: float | None = None,
        hear: float | None = None,
        consumers: tuple[ConsumerPlan, ...] = (),
        to: str = "",
        outage: float = OUTAGE_SECONDS,
        pace: float = 0.0,
        delivery: str = "outbox",
    ) -> None:
        self._both = delivery == "both"
        wal = self._both or delivery == "wal"
        self.ledger = folder / "ledger"
        self.log_path = folder / "log"
        self.mutant = mutant
        self.outcome = Outcome()
        self.server = Server(version, SERVER_SETTINGS | (LOGICAL_SETTINGS if wal else {}))
        self.dsns: dict[str, str] = {}
        self._seed = seed
        self._seconds = seconds
        self._writers = writers
        # A mutant never delivers all; but that anything arrives at all may take its time.
        patience = BROKER_DRAIN_SECONDS if to else DRAIN_SECONDS
        self._hear_seconds = hear or patience
        self._drain_seconds = drain or patience
        self._consumers = consumers or (RELAYS if to else WAL_CONSUMERS if wal else CONSUMERS)
        self._outage = outage
        self.pace = pace
        self.destination: Destination | None = DESTINATIONS[to]() if to else None
        everything = FAULTS + CHANGES * 2 + BROKER_FAULTS * (2 if to else 0)
        everything += SLOT_FAULTS if wal else ()
        everything += (PROMOTION,) if delivery == "wal" else ()
        everything += (MOVE,) * 8 if self._both else ()
        self._faults = everything if faults is None else tuple(faults)
        self._chance = random.Random(seed)
        self._board = Board()
        self._changes = Changes(self._board, self.dsns, random.Random(f"{seed}/changes"), delivery)
        self._wal = wal
        # The delivery that each consumer's processes are started with.
        self.deliveries = {
            plan.name: "outbox" if self._both else delivery for plan in self._consumers
        }
        # Where the log was when all that is judged had been committed.
        self._end = 0
        self._standby: Standby | None = None
        self._standby_share = _STANDBY_SHARE if faults is None else 1.0
        self._children: list[_Child] = []
        names = [plan.name for plan in self._consumers]
        if self.destination is not None:
            names.append(self.destination.consumer)
        self._books = {name: Book(name) for name in names}
        self._stops = 0
        self._unfounded: list[str] = []
        self.ledger.touch()
        self._reader = Reader(self.ledger)

    @contextmanager
    def open(self) -> Iterator[Campaign]:
        """The server and the consumers run within."""
        self.server.start()
        try:
            if self.destination is not None:
                self.destination.start()
            self.dsns[SUPERUSER] = self.server.create_database()
            database = self.dsns[SUPERUSER].rpartition("/")[2]
            for role in (OWNER, WRITER):
                self.dsns[role] = self.server.dsn(database, role)
            owned = f"ALTER DATABASE {database} OWNER TO {OWNER}"
            for role, statements in ((SUPERUSER, f"{ROLES}; {owned}"), (OWNER, SCHEMA)):
                with self._connected(role) as cursor:
                    cursor.execute(statements)
            self._children = [
                _Child(self, plan, number)
                for plan in self._consumers
                for number in range(plan.processes)
            ]
            # What is committed before a consumer has been registered is none of its business.
            for child in self._children:
                child.start("", 0)
            self._wait_for_consumers()
            yield self
        finally:
            for child in self._children:
                child.end()
            if self._standby is not None:
                self._standby.close()
            self.server.close()
            if self.destination is not None:
                self.destination.close()

    def run_round(self) -> list[str]:
        """One round; what was wrong in it."""
        outcome, number = self.outcome, self.outcome.rounds
        outcome.rounds += 1
        seed = self._seed * 1000 + number
        if PROMOTION in self._faults and (self._chance.random() < self._standby_share):
            self._have_standby()
        # Not to a standby that is about to be promoted.
        dsn = f"{self.dsns[WRITER]}?target_session_attrs=read-write"
        writers = Writers(dsn, self._writers, seed, self._board, forging=self._wal)
        writers.start()
        try:
            self._suffer()
        finally:
            writers.stop()
        outcome.transactions += writers.done
        # First: a change waits for the locks of a process that is in a black hole.
        for child in self._children:
            child.heal()
        self._changes.heal()
        if self.destination is not None:
            self.destination.heal()
        found = self._hear() + self._drain() + writers.problems[:_MOST_SHOWN]
        outcome.injected += self._changes.made
        self._changes.made.clear()
        outcome.problems += [f"round {number}: {problem}" for problem in found]
        return found

    def _suffer(self) -> None:
        began = time.monotonic()
        fault_at = began + self._chance.uniform(0.1, 0.8)
        while (now := time.monotonic()) < began + self._seconds:
            self._tend(now, armed=bool(self._faults))
            self._changes.tend(now)
            if self._faults and now >= fault_at:
                fault_at = now + self._chance.uniform(0.2, 1.0)
                self._inject(self._chance.choice(self._faults), now)
            time.sleep(0.02)  # A turn of the round, whose length is what is asked for.

    def _tend(self, now: float, armed: bool) -> None:
        """Start what has ended, and end what has been suffered long enough."""
        if self.destination is not None:
            self.destination.tend(now)
        for child in self._children:
            if (code := child.reap()) is not None:
                # SIGTERM ends it at once while it starts, before it is handled.
                if code not in (0, -signal.SIGKILL, -signal.SIGTERM):
                    self.outcome.problems.append(f"{child.plan.name}: a process ended with {code}")
                child.heal()
                child.restart_at = now + self._chance.uniform(0.0, 1.0)
            if child.restart_at is not None and now >= child.restart_at:
                failpoint, countdown = "", 0
                if armed and self._chance.random() < 0.6:
                    known = WAL_FAILPOINTS if self._wal else FAILPOINTS
                    known += MOVE_FAILPOINTS * 3 if self._both else ()
                    failpoint = self._chance.choice(
                        known if self.destination is None else known + RELAY_FAILPOINTS
                    )
                    countdown = self._countdown(failpoint)
                child.start(failpoint, countdown)
            if child.stopped_until is not None and now >= child.stopped_until:
                child.signal(signal.SIGCONT)
                child.stopped_until = None
            if child.stalled_until is not None and now >= child.stalled_until:
                child.proxy.resume()
                child.stalled_until = None

    def _countdown(self, failpoint: str) -> int:
        most = {"before a receiver": 300, "after a receiver": 300, "after a look": 300}
        if self._wal:
            # These are passed twice a second.
            most |= {"after a look": 8, "after the feedback": 8}
        seldom = ("empty", "claim", "slot", "move")
        rare = 2 if any(each in failpoint for each in seldom) else 15
        return self._chance.randint(1, most.get(failpoint, rare))

    def _inject(self, fault: str, now: float) -> None:
        child = self._chance.choice(self._children)
        length = self._chance.uniform(0.2, 2.5 * LEASE)
        if fault in CHANGES:
            # What comes of it is counted by its form.
            self._changes.inject(fault, now)
            return
        if fault == MOVE:
            name = child.plan.name
            self.deliveries[name] = "outbox" if self.deliveries[name] == "wal" else "wal"
            for each in self._children:
                if each.plan.name == name and each.running:
                    each.heal()
                    each.signal(self._chance.choice([signal.SIGKILL, signal.SIGTERM]))
        elif fault in SLOT_FAULTS:
            if not self._changes.strike_slot(fault):
                return
        elif fault == PROMOTION:
            if not self._promote():
                return
        elif fault in BROKER_FAULTS:
            assert self.destination is not None
            if not self.destination.inject(fault, self._chance.uniform(0.2, self._outage), now):
                return
        elif fault.startswith("restart"):
            mode = "fast" if fault.endswith("fast") else "immediate"
            self.server.stop(mode)
            time.sleep(self._chance.choice([0.0, 0.5]))  # The server is away for a while, or not.
            self.server.start()
        elif not child.running or child.stopped_until or child.stalled_until:
            return
        elif fault == "kill -9":
            child.signal(signal.SIGKILL)
        elif fault == "SIGTERM":
            child.signal(signal.SIGTERM)
        elif fault == "SIGSTOP":
            child.signal(signal.SIGSTOP)
            child.stopped_until = now + length
            self._stops += 1
        elif fault == "cut":
            child.proxy.cut()
        elif fault == "black hole":
            child.proxy.stall()
            child.stalled_until = now + length
        self.outcome.injected[fault] += 1

    def _have_standby(self) -> None:
        """Make a standby, if there is none; with copies of the slots, or without."""
        if self._standby is not None:
            return
        self._standby = Standby(self.server)
        self._standby.start()
        # PostgreSQL 17 brought them.
        if self.server.version >= 17 and self._chance.random() < 0.7:
            self._standby.copy_slots()
            self.outcome.remarks["the standby has copies of the slots"] += 1

    def _promote(self) -> bool:
        """Have the standby, if there is one that has all, take the server's place."""
        former, standby = self.server, self._standby
        if standby is None or not standby.follows:
            return False
        with self._changes.period():
            former.stop("fast")
            standby.take_over()
        self.server, self._standby = standby, None
        former.close()
        return True

    def _hear(self) -> list[str]:
        """Write until each consumer delivers some of it: a Gap may announce what came before."""
        deaf = {book.consumer for book in self._books.values()}
        written: set[Version] = set()
        deadline = time.monotonic() + self._hear_seconds
        while deaf and time.monotonic() < deadline:
            with self._connected(WRITER) as cursor:
                written.add(write_one(cursor))
            until = time.monotonic() + 4 * HEARTBEAT
            while deaf and time.monotonic() < until:
                self._tend(time.monotonic(), armed=False)
                self._read_ledger()
                deaf = {name for name in deaf if written.isdisjoint(self._books[name].uids)}
                time.sleep(0.05)  # What is delivered is in the ledgers, and nowhere told.
        for child in self._children:
            if deaf and child.running:
                child.signal(signal.SIGUSR1)
        return [f"{name}: nothing is delivered any more" for name in sorted(deaf)]

    def _drain(self) -> list[str]:
        """Wait until all has been delivered and acknowledged, and judge."""
        committed = self._committed()
        deadline = time.monotonic() + self._drain_seconds
        unacknowledged: list[str] = []
        while time.monotonic() < deadline:
            # Those that have a failpoint yet to come may die now as well, and are started again.
            self._tend(time.monotonic(), armed=False)
            self._read_ledger()
            missing = any(book.missing(committed) for book in self._books.values())
            if not missing and not (unacknowledged := self._unacknowledged()):
                break
            time.sleep(0.1)  # What is delivered is in the ledgers, and nowhere told.
        self._read_ledger()
        found = [problem for book in self._books.values() for problem in book.judge(committed)]
        for book in self._books.values():
            book.problems.clear()
        found += unacknowledged
        outcome = self.outcome
        outcome.committed = len(committed)
        books = self._books.values()
        outcome.delivered = sum(len(book.uids) for book in books)
        outcome.redelivered = sum(book.deliveries - len(book.uids) for book in books)
        outcome.unmarked = sum(book.unmarked for book in books)
        if outcome.unmarked > self._stops * max(plan.workers for plan in self._consumers):
            # A process that is stopped between a receiver's call and its note is excused.
            found.append(
                f"{outcome.unmarked} deliveries were not said to be redelivered, "
                f"and processes were stopped {self._stops} times"
            )
        if self.destination is not None and self.destination.deduplicates:
            book = self._books[self.destination.consumer]
            if book.deliveries != len(book.uids):
                found.append(f"{book.consumer}: {book.deliveries - len(book.uids)} are there twice")
        if self.destination is not None:
            # What a process has given to the broker's client may come behind what another, that
            # has taken over, has sent since.
            outdated = self._books[self.destination.consumer].outdated
            if outdated:
                outcome.remarks["a record ended with an older version"] += outdated
        outcome.announced = sum(len(book.announced(committed)) for book in books)
        found += self._unfounded
        self._unfounded.clear()
        return found

    def _read_ledger(self) -> None:
        self._take(self._reader.read())
        if self.destination is not None:
            self._take(self.destination.read())

    def _take(self, notes: Iterable[Note]) -> None:
        for note in notes:
            if isinstance(note, Delivery):
                self._books[note.consumer].note(note)
            elif isinstance(note, Announced):
                self._books[note.consumer].gaps.append(note)
                self.outcome.remarks[f"gap {note.detail}"] += 1
                if not self._changes.explain(note.since, note.until):
                    self._unfounded.append(
                        f"a Gap, where nothing was lost: {note}; last changed {self._changes.last}"
                    )
            else:
                detail = "" if note.kind == "emptied" else note.detail
                self.outcome.remarks[f"{note.kind} {detail}".strip()] += 1

    @contextmanager
    def _connected(self, role: str = SUPERUSER) -> Iterator[Cursor]:
        with (
            closing(psycopg2.connect(self.dsns[role])) as connection,
            connection,
            connection.cursor() as cursor,
        ):
            yield cursor

    def _committed(self) -> dict[Version, datetime]:
        """The versions that were committed, and when."""
        with self._connected() as cursor:
            cursor.execute(
                "SELECT record, n, nonce, pg_catalog.pg_xact_commit_timestamp(txid::xid)"
                " FROM history"
            )
            found = {(record, n, nonce): at for record, n, nonce, at in cursor.fetchall()}
            cursor.execute("SELECT pg_catalog.pg_current_wal_lsn() - '0/0'::pg_lsn")
            [(end,)] = cursor.fetchall()
            self._end = int(end)
            return found

    def _unacknowledged(self) -> list[str]:
        """Which cursors do not see a transaction that has written, as PostgreSQL judges."""
        found = self._elsewhere() or (self._behind() if self._wal else [])
        with self._connected() as cursor:
            cursor.execute(
                "SELECT c.name, c.part, pg_catalog.count(*)"
                " FROM pgsignals.consumers AS c, (SELECT DISTINCT txid FROM history) AS h"
                " WHERE c.lsn IS NULL"
                " AND NOT pg_catalog.pg_visible_in_snapshot(h.txid, c.snapshot::pg_snapshot)"
                " GROUP BY 1, 2"
            )
            return found + [
                f"{name}: part {part} has not acknowledged {count} transactions"
                for name, part, count in cursor.fetchall()
            ]

    def _elsewhere(self) -> list[str]:
        """Which consumers have yet to come to the delivery that their processes were told."""
        with self._connected() as cursor:
            cursor.execute("SELECT DISTINCT name, lsn IS NOT NULL FROM pgsignals.consumers")
            return [
                f"{name} has yet to come to delivery={told!r}"
                for name, logged in cursor.fetchall()
                if (told := self.deliveries.get(name)) and logged != (told == "wal")
            ]

    def _behind(self) -> list[str]:
        """Which consumers and slots have yet to come to where the log was, or are wrongly ahead."""
        found: list[str] = []
        with self._connected() as cursor:
            cursor.execute(
                "SELECT pg_catalog.count(*) FILTER (WHERE confirmed_flush_lsn < %(end)s),"
                " pg_catalog.max(confirmed_flush_lsn), pg_catalog.count(*)"
                " FROM (SELECT coalesce(confirmed_flush_lsn - '0/0'::pg_lsn, 0)"
                "   AS confirmed_flush_lsn FROM pg_catalog.pg_replication_slots"
                "   WHERE slot_type = 'logical') AS s",
                {"end": self._end},
            )
            [(late, furthest, slots)] = cursor.fetchall()
            wanted = list(self.deliveries.values()).count("wal")
            if self.destination is not None:
                wanted *= 2  # A relay's broker has a cursor, and so a slot, of its own.
            if late or slots != wanted:
                found.append(f"{late} of {slots} slots keep what is acknowledged")
        # Asked later: a position goes up, and what the server was told never lies above it.
        with self._connected() as cursor:
            cursor.execute("SELECT name, lsn FROM pgsignals.consumers WHERE lsn IS NOT NULL")
            rows = cursor.fetchall()
            found += [f"{name} has not acknowledged all" for name, lsn in rows if lsn < self._end]
            if rows and (furthest or 0) > max(lsn for _, lsn in rows):
                found.append("the server has been told more than is saved")
        return found

    def _wait_for_consumers(self) -> None:
        parts = sum(plan.partitions for plan in self._consumers) + bool(self.destination)
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and all(child.running for child in self._children):
            with (
                suppress(psycopg2.errors.UndefinedTable),
                self._connected() as cursor,
            ):
                cursor.execute("SELECT pg_catalog.count(*) FROM pgsignals.consumers")
                if cursor.fetchall() == [(parts,)]:
                    return
            time.sleep(0.05)  # The table of consumers is all that tells.
        raise RuntimeError(f"the consumers have not begun: see {self.log_path}")
