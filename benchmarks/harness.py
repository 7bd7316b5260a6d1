"""What every figure needs: a server, sides that take turns, checked counts, medians."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection as Connection

import pgsignals
from pgsignals.testing import Server

DEADLINE = 120.0

# fsync is on and the rest as PostgreSQL has it, but for what would come when it likes and hit one
# side only: neither checkpoints nor vacuum come while we measure.
SETTINGS = {
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "max_connections": "200",
    # Updates and deletes write some more of it, on all sides; these benchmarks insert.
    "wal_level": "logical",
    "max_replication_slots": "40",
}

ORDERS = """
    CREATE TABLE orders (
        id bigserial PRIMARY KEY,
        customer_id bigint NOT NULL,
        status text NOT NULL DEFAULT 'new',
        total numeric(10, 2) NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    )
"""
INSERT_ONE = "INSERT INTO orders (customer_id, total) VALUES (7, 19.90)"
INSERT_MANY = """
    INSERT INTO orders (customer_id, status, total)
    SELECT n %% 1000, 'new', n / 100.0 FROM generate_series(1, %s) AS n
"""


class Bench:
    """One run: ``rounds`` of every side, and the server that all rows share.

    ``quick`` takes smaller loads.
    """

    def __init__(self, rounds: int, quick: bool) -> None:
        self.rounds = rounds
        self.quick = quick
        self._stack = ExitStack()
        self._databases: list[str] = []

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def scaled(self, size: int) -> int:
        """A load of ``size``, or a tenth of it where quickness counts more than truth."""
        return size // 10 if self.quick else size

    @cached_property
    def server(self) -> Server:
        """A server of our own, set so that nothing but us is at work in it."""
        return self._stack.enter_context(Server(settings=SETTINGS, fsync=True))

    def shop(self, *statements: str) -> str:
        """A database with the empty table ``orders``, and its URL.

        Each side has its own: a listener is woken by every notification of its database.
        """
        dsn = shop(self.server, *statements)
        self._databases.append(dsn)
        return dsn

    def settle(self) -> None:
        """Have what was written so far cost nobody anything later."""
        connection = connect(self.server.dsn())
        execute(connection, "CHECKPOINT")
        connection.close()

    def tidy(self) -> None:
        """Drop the databases that were made so far."""
        connection = connect(self.server.dsn())
        for dsn in self._databases:
            drop_slots(dsn)
            name = sql.Identifier(dsn.rpartition("/")[2])
            execute(connection, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
        self._databases.clear()
        execute(connection, "CHECKPOINT")
        connection.close()


class Unavailable(Exception):
    """What a row needs is not on this machine."""


@dataclass(frozen=True)
class Plot:
    """A plot, saved as ``name``.svg: points (x, y) for each side."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Figure:
    """One line of the table: a value for each round, of which the median counts.

    ``target`` is the bound that we set ourselves, ``at_most`` or, when that is false, at least;
    None for a line that is only there to compare with.
    """

    what: str
    values: Sequence[float]
    unit: str
    target: float | None = None
    at_most: bool = True
    plot: Plot | None = None

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        """Whether the median keeps to the target."""
        if self.target is None:
            return True
        return self.median <= self.target if self.at_most else self.median >= self.target


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round, so that what slows the whole machine for a while cancels out."""
    return [a / b for a, b in zip(above, below, strict=True)]


def percentile(values: Sequence[float], percent: int) -> float:
    """What so many percent of the values are not above."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def interleave(
    rounds: int, sides: Mapping[str, Callable[[], float]], warm_up: bool = True
) -> dict[str, list[float]]:
    """Run all sides in turn, ``rounds`` times, every other time in reverse order."""
    order = list(sides)
    found: dict[str, list[float]] = {name: [] for name in order}
    if warm_up:
        for run in sides.values():
            run()
    for _ in range(rounds):
        for name in order:
            found[name].append(sides[name]())
        order.reverse()
    return found


def shop(server: Server, *statements: str) -> str:
    """A new database with the empty table ``orders``, and its URL."""
    dsn = server.create_database()
    connection = connect(dsn)
    for statement in (ORDERS, *statements):
        execute(connection, statement)
    connection.close()
    return dsn


def connect(dsn: str) -> Connection:
    """A connection in autocommit mode."""
    connection: Connection = psycopg2.connect(dsn)
    connection.autocommit = True
    return connection


def execute(connection: Connection, statement: Any, parameters: Any = None) -> None:
    """Run a statement whose result does not matter."""
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)


@contextmanager
def watching(dsn: str, receiver: Callable[[Any], object], **options: Any) -> Iterator[None]:
    """A Hub, started with ``options``, that calls ``receiver`` with each inserted order."""
    with pgsignals.Hub() as hub:
        hub.subscribe(receiver, "orders", "inserted")
        hub.start(dsn, [pgsignals.watch("orders", "inserted")], **options)
        yield


@contextmanager
def consuming(
    dsn: str,
    receiver: Callable[[Any], object],
    name: str = "bench",
    delivery: str = "outbox",
    **options: Any,
) -> Iterator[None]:
    """The same in a durable delivery."""
    if delivery == "wal":
        options["allow_unbounded_wal"] = True
    with watching(dsn, receiver, delivery=delivery, name=name, **options):
        yield


_numbers = count(1)


@contextmanager
def reading(dsn: str, receiver: Callable[[Any], object], **options: Any) -> Iterator[None]:
    """The same in WAL delivery, by a consumer of its own.

    A consumer that was there before would read what all sides have written since, and its slot
    would have the server keep it.
    """
    with consuming(dsn, receiver, f"bench{next(_numbers)}", "wal", **options):
        yield
    drop_slots(dsn)


def drop_slots(dsn: str) -> None:
    """Drop the slots of a database, which no consumer reads any more."""
    connection = connect(dsn)
    execute(
        connection,
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
        " WHERE database = current_database()",
    )
    connection.close()


class Miscounted(Exception):
    """Other events have come than were written."""


class Counter:
    """The least that a receiver can do: it counts, and knows when the last event came.

    Whoever writes says how much; that neither less nor more has come is checked after each wait,
    which lasts ``patience`` seconds at most, and before the next count begins.
    """

    patience = DEADLINE

    def __init__(self) -> None:
        self.received = 0
        self.written = 0
        self._left = 0
        self._finished = threading.Event()
        self._finished_at = 0.0

    def expect(self, count: int) -> None:
        """Begin to count down."""
        self.check()
        self.written += count
        self._left = count
        self._finished.clear()

    def __call__(self, event: object) -> None:
        self.received += 1
        self._left -= 1
        if self._left == 0:
            self._finished_at = time.perf_counter()
            self._finished.set()

    def wait(self) -> float:
        """When the last expected event came, by ``time.perf_counter``. Raises Miscounted."""
        self._finished.wait(self.patience)
        self.check()
        return self._finished_at

    def wait_for_all(self, count: int) -> None:
        """Wait until ``count`` more events than were known of have come; raises Miscounted."""
        self.written += count
        deadline = time.monotonic() + self.patience
        while self.received < self.written and time.monotonic() < deadline:
            time.sleep(0.005)
        self.check()

    def check(self) -> None:
        """Raise Miscounted unless all have come that were written, and nothing else."""
        if self.received != self.written:
            raise Miscounted(f"{self.received:,} events have come of {self.written:,} rows")
