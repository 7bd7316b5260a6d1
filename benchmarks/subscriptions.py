"""Subscriptions to single records: what an event costs with 100,000 of them, and with ten."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pgsignals

from .harness import Bench, Counter, Figure, connect, execute, interleave, ratios

INSERT = """
    INSERT INTO orders (customer_id, total)
    SELECT n %% %s, 19.90 FROM generate_series(1, %s) AS n
"""


class Side:
    """A Hub with one subscription for each customer; each event is for exactly one of them."""

    def __init__(self, dsn: str, customers: int, rows: int) -> None:
        self._customers = customers
        self._rows = rows
        self._counter = Counter()
        self._connection = connect(dsn)
        self._hub = pgsignals.Hub()
        for customer in range(customers):
            self._hub.subscribe(self._counter, "orders", "inserted", customer_id=customer)
        self._hub.start(dsn, [pgsignals.watch("orders", "inserted", extra=["customer_id"])])

    def run(self) -> float:
        """This process's CPU time for each event, in microseconds."""
        execute(self._connection, "TRUNCATE orders")
        self._counter.expect(self._rows)
        began = time.process_time()
        execute(self._connection, INSERT, (self._customers, self._rows))
        self._counter.wait()
        return 1e6 * (time.process_time() - began) / self._rows

    def close(self) -> None:
        """Stop the Hub."""
        self._hub.stop()
        self._connection.close()


def measure(bench: Bench) -> list[Figure]:
    """The cost of an event for which one receiver is called, found among few and among many."""
    many, rows = bench.scaled(100_000), bench.scaled(100_000)
    with ExitStack() as stack:
        sides = {number: Side(bench.shop(), number, rows) for number in (10, many)}
        for side in sides.values():
            stack.callback(side.close)
        cost = interleave(bench.rounds, {str(n): side.run for n, side in sides.items()})
    return [
        Figure(
            f"{many:,} per-record subscriptions ÷ ten",
            ratios(cost[str(many)], cost["10"]),
            "",
            1.2,
        ),
        Figure("  CPU for each event, ten", cost["10"], "µs"),
        Figure(f"  CPU for each event, {many:,}", cost[str(many)], "µs"),
    ]
