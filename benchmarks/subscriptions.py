"""Subscriptions to single records: what an event costs with 100,000 of them, and with ten."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pgsignals
from pgsignals.testing import Server

from .harness import (
    Counter,
    Figure,
    Options,
    connect,
    execute,
    interleave,
    ratios,
    shop,
    throwaway_server,
)

INSERT = """
    INSERT INTO orders (customer_id, total)
    SELECT n %% %s, 19.90 FROM generate_series(1, %s) AS n
"""


class _Side:
    """A Hub with one subscription for each customer; each event is for exactly one of them."""

    def __init__(self, server: Server, customers: int, rows: int) -> None:
        self._customers = customers
        self._rows = rows
        self._counter = Counter()
        dsn = shop(server)
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
        self._hub.stop()
        self._connection.close()


def measure(options: Options) -> list[Figure]:
    """The cost of an event for which one receiver is called, found among few and among many."""
    many, rows = options.scaled(100_000), options.scaled(100_000)
    with ExitStack() as stack:
        server = stack.enter_context(throwaway_server())
        sides = {number: _Side(server, number, rows) for number in (10, many)}
        for side in sides.values():
            stack.callback(side.close)
        cost = interleave(options.rounds, {str(n): side.run for n, side in sides.items()})
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
