"""Durable deliveries: from INSERT's return to the receiver's call, alone and beside writers."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import pgsignals

from .harness import Bench, Counter, Figure, percentile
from .latency import Clock, writer
from .writers import CLIENTS, Pgbench, count_orders

PROBES = "CREATE TABLE probes (id bigserial PRIMARY KEY, customer_id bigint, total numeric)"
# Longer than a consumer stays awake after an event, so that each of these wakes it.
IDLE_PAUSE = 250.0
BUSY_PAUSE = 15.0


class _Side:
    """A Hub with both tables, of which one is only written to by who measures."""

    def __init__(self, bench: Bench, **options: Any) -> None:
        self._dsn = bench.shop(PROBES)
        self._pgbench = Pgbench(bench)
        self._clock = Clock()
        self._counter = Counter()
        self._stack = ExitStack()
        hub = self._stack.enter_context(pgsignals.Hub())
        hub.subscribe(self._clock, "probes", "inserted")
        hub.subscribe(self._counter, "orders", "inserted")
        hub.start(
            self._dsn,
            [pgsignals.watch("probes", "inserted"), pgsignals.watch("orders", "inserted")],
            **options,
        )

    def idle(self, inserts: int) -> list[float]:
        """Milliseconds of each."""
        return self._probe(inserts, IDLE_PAUSE)

    def busy(self, inserts: int) -> list[float]:
        """Milliseconds of each, while 32 clients write to the other table."""
        before = count_orders(self._dsn)
        with self._pgbench.running(self._dsn, CLIENTS):
            time.sleep(0.5)
            found = self._probe(inserts, BUSY_PAUSE)
        self._counter.wait_for_all(count_orders(self._dsn) - before)
        return found

    def _probe(self, inserts: int, pause: float) -> list[float]:
        self._clock.expect(inserts)
        # What is not flushed is not in the log yet: WAL delivery would wait for the WAL writer.
        with writer(self._dsn, "probes", inserts, pause, synchronous=True) as insert:
            written = insert()
            called = self._clock.take()
        return [1000 * (at - returned) for at, (_, returned) in zip(called, written, strict=True)]

    def close(self) -> None:
        self._stack.close()


def measure(bench: Bench) -> list[Figure]:
    """Percentiles over the INSERTs of all rounds."""
    with ExitStack() as stack:
        sides = {
            "notify": _Side(bench),
            "outbox": _Side(bench, delivery="outbox", name="bench"),
            "WAL": _Side(bench, delivery="wal", name="bench", allow_unbounded_wal=True),
        }
        for side in sides.values():
            stack.callback(side.close)
        idle: dict[str, list[float]] = {name: [] for name in sides}
        busy: dict[str, list[float]] = {"outbox": [], "WAL": []}
        for _ in range(bench.rounds):
            for name, values in idle.items():
                values += sides[name].idle(10 if bench.quick else 25)
            for name, values in busy.items():
                values += sides[name].busy(30 if bench.quick else 100)
    figures = [
        Figure(f"{side} latency, {name}, p{percent}", [percentile(values, percent)], "ms", target)
        for name, found, targets in (
            ("idle", idle, {"outbox": (5.0, 50.0), "WAL": (None, None)}),
            (f"beside {CLIENTS} writers", busy, {"outbox": (5.0, 50.0), "WAL": (4.0, 20.0)}),
        )
        for side, bounds in targets.items()
        for values in (found[side],)
        for percent, target in zip((50, 99), bounds, strict=True)
    ]
    ratio = percentile(idle["WAL"], 50) / percentile(idle["notify"], 50)
    return [*figures, Figure("  WAL ÷ notify, idle, p50", [ratio], "", 1.3)]
