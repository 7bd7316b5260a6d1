"""Outbox delivery: from INSERT's return to the receiver's call, with nothing else and with much."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pgsignals

from .harness import Bench, Counter, Figure, percentile
from .latency import Clock, writer
from .writers import CLIENTS, Pgbench, count_orders

PROBES = "CREATE TABLE probes (id bigserial PRIMARY KEY, customer_id bigint, total numeric)"
# Longer than a consumer stays awake after an event, so that each of these wakes it.
IDLE_PAUSE = 250.0
BUSY_PAUSE = 15.0


class _Side:
    """A consumer of both tables, of which one is only written to by who measures."""

    def __init__(self, bench: Bench) -> None:
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
            delivery="outbox",
            name="bench",
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
        with writer(self._dsn, "probes", inserts, pause) as insert:
            written = insert()
            called = self._clock.take()
        return [1000 * (at - returned) for at, (_, returned) in zip(called, written, strict=True)]

    def close(self) -> None:
        self._stack.close()


def measure(bench: Bench) -> list[Figure]:
    """Percentiles over the INSERTs of all rounds."""
    side = _Side(bench)
    idle: list[float] = []
    busy: list[float] = []
    try:
        for _ in range(bench.rounds):
            idle += side.idle(10 if bench.quick else 25)
            busy += side.busy(30 if bench.quick else 100)
    finally:
        side.close()
    return [
        Figure(f"outbox latency, {name}, p{percent}", [percentile(values, percent)], "ms", target)
        for name, values in (("idle", idle), (f"beside {CLIENTS} writers", busy))
        for percent, target in ((50, 5.0), (99, 50.0))
    ]
