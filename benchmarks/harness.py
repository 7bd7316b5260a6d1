"""What every figure needs: servers, interleaved rounds, medians, the table."""

from __future__ import annotations

import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import psycopg2
from psycopg2.extensions import connection as Connection

import pgsignals
from pgsignals.testing import Server

DEADLINE = 120.0
_WIDTHS = (47, 16, 17, 9, 6)

# Checkpoints and vacuum come when they like and hit one side only: neither comes while we measure.
_SETTINGS = {
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "shared_buffers": "256MB",
    "max_connections": "100",
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


@dataclass(frozen=True)
class Options:
    """``rounds`` that every side of a comparison runs; ``quick`` takes smaller loads."""

    rounds: int
    quick: bool

    def scaled(self, size: int) -> int:
        """A load of ``size``, or a tenth of it where quickness counts more than truth."""
        return size // 10 if self.quick else size


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

    def cells(self) -> tuple[str, str, str, str, str]:
        """The line's texts: what, median, the range of the rounds, target, verdict."""
        bound = verdict = ""
        if self.target is not None:
            bound = f"{'≤' if self.at_most else '≥'} {_number(self.target)}"
            verdict = "ok" if self.met else "MISSED"
        spread = ""
        if len(self.values) > 1:
            spread = f"{_number(min(self.values))} … {_number(max(self.values))}"
        return self.what, f"{_number(self.median)} {self.unit}".strip(), spread, bound, verdict


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def table(figures: Iterable[Figure]) -> str:
    """The figures as text in columns."""
    lines = [("figure", "median", "rounds", "target", ""), *(f.cells() for f in figures)]
    # Wide enough for all tables of a run to align.
    widths = [
        max(least, *map(len, column))
        for least, column in zip(_WIDTHS, zip(*lines, strict=True), strict=True)
    ]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round, so that what slows the whole machine for a while cancels out."""
    return [a / b for a, b in zip(above, below, strict=True)]


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


@contextmanager
def throwaway_server(fsync: bool = False) -> Iterator[Server]:
    """A server of our own, set so that nothing but us is at work in it."""
    with Server(settings=_SETTINGS, fsync=fsync) as server:
        yield server


def shop(server: Server, *statements: str) -> str:
    """A database with the empty table ``orders``, and its URL.

    Each side has its own: a listener is woken by every notification of its database.
    """
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


def execute(connection: Connection, statement: str, parameters: Any = None) -> None:
    """Run a statement whose result does not matter."""
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)


@contextmanager
def watching(dsn: str, receiver: Callable[[Any], object], **options: Any) -> Iterator[None]:
    """A Hub that calls ``receiver`` with each inserted order."""
    with pgsignals.Hub() as hub:
        hub.subscribe(receiver, "orders", "inserted")
        hub.start(dsn, [pgsignals.watch("orders", "inserted", **options)])
        yield


class Counter:
    """The least that a receiver can do: it counts, and knows when the last event came."""

    def __init__(self) -> None:
        self.received = 0
        self._left = 0
        self._finished = threading.Event()
        self._finished_at = 0.0

    def expect(self, count: int) -> None:
        """Begin to count down."""
        self._left = count
        self._finished.clear()

    def __call__(self, event: object) -> None:
        self.received += 1
        self._left -= 1
        if self._left == 0:
            self._finished_at = time.perf_counter()
            self._finished.set()

    def wait_for_all(self, count: int) -> None:
        """Wait until ``count`` events have come in all; raise RuntimeError if others come."""
        deadline = time.monotonic() + DEADLINE
        while self.received < count and time.monotonic() < deadline:
            time.sleep(0.005)
        if self.received != count:
            raise RuntimeError(f"{self.received} events have come of {count} rows")

    def wait(self) -> float:
        """When the last expected event came, by ``time.perf_counter``."""
        if not self._finished.wait(DEADLINE):
            raise RuntimeError(f"{self._left} events have not come within {DEADLINE:g} s")
        return self._finished_at


def versions(server: Server) -> str:
    """What the figures were measured with."""
    return (
        f"pgsignals {pgsignals.__version__}, PostgreSQL {server.version}, "
        f"Python {platform.python_version()}, psycopg2 {version('psycopg2-binary')}, "
        f"{platform.machine()}"
    )
