"""32 clients that insert single rows, with fsync on: the share of their throughput that is kept."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from psycopg2.extensions import connection as Connection

from .baselines import OUTBOX, ROW_TRIGGER, polled_outbox, select_loop
from .harness import (
    DEADLINE,
    INSERT_ONE,
    Bench,
    Counter,
    Figure,
    Miscounted,
    Unavailable,
    connect,
    consuming,
    execute,
    interleave,
    ratios,
    reading,
    watching,
)
from .processes import processor_seconds

CLIENTS = 32
# In turn: what is compared most closely, notify and a row trigger, comes twice, back and forth, so
# that a machine which becomes slower or faster meanwhile favours neither.
_ORDERS = (
    (
        *("unwatched", "notify", "row trigger", "row trigger", "notify"),
        *("outbox", "wal", "messages", "polled"),
    ),
    (
        *("polled", "messages", "wal", "outbox"),
        *("notify", "row trigger", "row trigger", "notify", "unwatched"),
    ),
)

_FEW = ("unwatched", "outbox", "wal")

# How long what an outbox polled by id has missed is waited for, in vain.
_LOSSY_PATIENCE = 2.0

Listening = Callable[[str, Callable[[Any], object]], AbstractContextManager[None]]


class Pgbench:
    """pgbench, whose clients insert one order in each transaction."""

    def __init__(self, bench: Bench) -> None:
        beside = bench.server.installation.bindir / "pgbench"
        found = str(beside) if beside.exists() else shutil.which("pgbench")
        if found is None:
            raise Unavailable("pgbench comes with PostgreSQL's server (`apt install postgresql`)")
        self._program = found

    def run(self, dsn: str, clients: int, seconds: float) -> tuple[int, float]:
        """Transactions, and those of each second."""
        with self._started(dsn, clients, seconds) as process:
            output, errors = process.communicate()
        count = re.search(r"actually processed: (\d+)", output)
        rate = re.search(r"tps = ([\d.]+) \(without", output)
        if process.returncode or count is None or rate is None:
            raise RuntimeError(f"pgbench failed:\n{output}{errors}")
        return int(count[1]), float(rate[1])

    @contextmanager
    def running(self, dsn: str, clients: int) -> Iterator[None]:
        """Have them at work meanwhile."""
        with self._started(dsn, clients, DEADLINE) as process:
            try:
                yield
                if process.poll() is not None:
                    raise RuntimeError(f"pgbench ended too soon: {process.communicate()}")
            finally:
                process.terminate()
                process.communicate()
                _wait_until_alone(dsn)

    @contextmanager
    def _started(self, dsn: str, clients: int, seconds: float) -> Iterator[subprocess.Popen[str]]:
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
            script.write(INSERT_ONE)
            script.flush()
            threads = min(2, clients)
            options = f"-n -c {clients} -j {threads} -M prepared -T {seconds:.0f} -f"
            with subprocess.Popen(
                [self._program, *options.split(), script.name, dsn],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as process:
                yield process


def _wait_until_alone(dsn: str) -> None:
    """Wait for the end of pgbench's sessions, each of which may be about to commit."""
    connection = connect(dsn)
    deadline = time.monotonic() + DEADLINE
    statement = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'pgbench'"
    )
    while _number(connection, statement):
        if time.monotonic() > deadline:
            raise RuntimeError("pgbench's sessions do not end")
        time.sleep(0.01)
    connection.close()


def _number(connection: Connection, statement: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        [(number,)] = cursor.fetchall()
    return int(number)


def count_orders(dsn: str) -> int:
    """How many rows the table has."""
    connection = connect(dsn)
    number = _number(connection, "SELECT count(*) FROM orders")
    connection.close()
    return number


@dataclass
class Side:
    """Clients of one database, with the side's own listener at work.

    ``lossy``: the listener is known to miss events, which are counted in ``lost`` (of 1,000).
    ``used`` has the microseconds of processor time that the server took for each transaction, and
    ``listened`` those of this process.
    """

    bench: Bench
    dsn: str
    listen: Listening | None = None
    lossy: bool = False
    lost: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    listened: list[float] = field(default_factory=list)

    def run(self, clients: int, seconds: float) -> float:
        """Transactions per second."""
        connection = connect(self.dsn)
        execute(connection, "TRUNCATE orders")
        if self.lossy:
            execute(connection, "TRUNCATE events RESTART IDENTITY")
        connection.close()
        self.bench.settle()
        with ExitStack() as stack:
            counter = Counter()
            if self.lossy:
                counter.patience = _LOSSY_PATIENCE
            if self.listen is not None:
                stack.enter_context(self.listen(self.dsn, counter))
            server = self.bench.server.pid
            used, listened = processor_seconds(server), time.process_time()
            written, rate = Pgbench(self.bench).run(self.dsn, clients, seconds)
            self.used.append(1e6 * (processor_seconds(server) - used) / written)
            self.listened.append(1e6 * (time.process_time() - listened) / written)
            if self.listen is not None:
                try:
                    counter.wait_for_all(written)
                except Miscounted:
                    if not self.lossy or counter.received > written:
                        raise
                self.lost.append(1000 * (written - counter.received) / written)
        return rate


def sides(bench: Bench) -> dict[str, Side]:
    """One for each way to learn of the rows."""
    return {
        "unwatched": Side(bench, bench.shop()),
        "notify": Side(bench, bench.shop(), watching),
        "row trigger": Side(bench, bench.shop(ROW_TRIGGER), select_loop),
        "outbox": Side(bench, bench.shop(), consuming),
        "wal": Side(bench, bench.shop(), reading),
        "messages": Side(bench, bench.shop(), partial(reading, capture="messages")),
        "polled": Side(bench, bench.shop(OUTBOX), polled_outbox, lossy=True),
    }


def few(bench: Bench) -> list[Figure]:
    """The same with eight clients, in the durable deliveries."""
    clients, seconds = 8, 1.0 if bench.quick else 4.0
    each = {name: side for name, side in sides(bench).items() if name in _FEW}
    found = interleave(
        bench.rounds, {name: partial(side.run, clients, seconds) for name, side in each.items()}
    )
    shares = {name: ratios(rates, found["unwatched"]) for name, rates in found.items()}
    what = f"{clients} single-row writers, share kept by"
    return [
        Figure(f"{what} WAL delivery", shares["wal"], "", 0.78, at_most=False),
        Figure("  by outbox", shares["outbox"], ""),
        Figure("  unwatched", found["unwatched"], "tps"),
    ]


def measure(bench: Bench) -> list[Figure]:
    """The share of the unwatched throughput that each way keeps."""
    seconds = 1.0 if bench.quick else 4.0
    each = sides(bench)
    found: dict[str, list[float]] = {name: [] for name in each}
    for side in each.values():
        side.run(CLIENTS, 1.0)
    for number in range(bench.rounds):
        turns: dict[str, list[float]] = {name: [] for name in each}
        for name in _ORDERS[number % 2]:
            turns[name].append(each[name].run(CLIENTS, seconds))
        for name, rates in turns.items():
            found[name].append(sum(rates) / len(rates))
    shares = {name: ratios(rates, found["unwatched"]) for name, rates in found.items()}
    return [
        Figure(
            f"{CLIENTS} single-row writers, notify ÷ row trigger",
            ratios(found["notify"], found["row trigger"]),
            "",
            1.0,
            at_most=False,
        ),
        Figure("  share of unwatched kept by notify", shares["notify"], ""),
        Figure("  share kept by a row trigger", shares["row trigger"], ""),
        Figure("  unwatched", found["unwatched"], "tps"),
        Figure(
            f"{CLIENTS} single-row writers, share kept by outbox",
            shares["outbox"],
            "",
            0.6,
            at_most=False,
        ),
        Figure(
            f"{CLIENTS} single-row writers, share kept by WAL delivery",
            shares["wal"],
            "",
            0.78,
            at_most=False,
        ),
        Figure("  ÷ outbox", ratios(found["wal"], found["outbox"]), "", 1.7, at_most=False),
        Figure("  share kept with messages", shares["messages"], "", 0.55, at_most=False),
        Figure(
            "  processor time of the server, WAL delivery ÷ unwatched",
            ratios(each["wal"].used[1:], each["unwatched"].used[1:]),
            "",
            1.25,
        ),
        Figure("  share kept by an outbox polled by id", shares["polled"], ""),
        Figure("  of which its reader misses", each["polled"].lost, "‰"),
        # What explains the shares: the rest of the time is waiting, for the disk and one another.
        *(
            Figure(f"  processor time of the server, a transaction, {name}", side.used, "µs")
            for name, side in each.items()
        ),
        *(
            Figure(f"  processor time of the listener, {name}", side.listened, "µs")
            for name, side in each.items()
            if side.listen is not None
        ),
    ]
