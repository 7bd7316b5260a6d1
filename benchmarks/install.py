"""What `start` takes where many tables are watched: with triggers to install, and without."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import pgsignals

from .harness import Bench, Figure, drop_slots, ratios

_names = count(1)


def _tables(number: int) -> str:
    return "".join(
        f"CREATE TABLE orders_{n} (id bigserial PRIMARY KEY, customer_id bigint, status text);"
        for n in range(number)
    )


def _start(dsn: str, tables: int, options: dict[str, Any]) -> float:
    """Start a Hub that watches these tables, and stop it; return how long the start took."""
    watchers = [pgsignals.watch(f"orders_{n}") for n in range(tables)]
    with pgsignals.Hub() as hub:
        began = time.perf_counter()
        hub.start(dsn, watchers, **options)
        return time.perf_counter() - began


class Side:
    """Starts in new databases with so many tables, and keeps what each start took."""

    def __init__(self, bench: Bench, tables: int, **options: Any) -> None:
        self._bench = bench
        self._tables = tables
        self._options = options
        self.first: list[float] = []
        self.second: list[float] = []

    def run(self) -> None:
        """Start twice in a new database."""
        dsn = self._bench.shop(_tables(self._tables))
        options = dict(self._options)
        if options:
            options["name"] = f"bench{next(_names)}"
        self.first.append(_start(dsn, self._tables, options))
        self.second.append(_start(dsn, self._tables, options))
        drop_slots(dsn)


def measure(bench: Bench) -> list[Figure]:
    """How long the first start takes with many tables and with some, and how long the second."""
    few, many = bench.scaled(60), bench.scaled(240)
    sides = {
        "few": Side(bench, few),
        "many": Side(bench, many),
        "outbox": Side(bench, many, delivery="outbox"),
        "wal": Side(bench, many, delivery="wal", allow_unbounded_wal=True),
    }
    # The first start of a process imports what the later ones have.
    Side(bench, 1).run()
    order = list(sides.values())
    for _ in range(bench.rounds):
        for side in order:
            side.run()
        order.reverse()
    ours = sides["many"]
    return [
        Figure(
            f"first start with {many} tables ÷ with {few}",
            ratios(ours.first, sides["few"].first),
            "",
            5,
        ),
        Figure(f"  first start with {many} tables", ours.first, "s", 4),
        Figure(f"  first start with {few} tables", sides["few"].first, "s"),
        Figure(f"second start with {many} tables, nothing to install", ours.second, "s", 0.5),
        Figure(f"  with {few} tables", sides["few"].second, "s"),
        Figure(f"first start with {many} tables, outbox delivery", sides["outbox"].first, "s"),
        Figure("  second start", sides["outbox"].second, "s"),
        Figure(f"first start with {many} tables, WAL delivery", sides["wal"].first, "s"),
        Figure("  second start", sides["wal"].second, "s"),
    ]
