"""How much the listening process grows while a transaction of 1,000,000 rows arrives (Linux)."""

from __future__ import annotations

import sys

from .harness import INSERT_MANY, Bench, Counter, Figure, connect, execute, watching
from .processes import Child, megabytes, say


def measure(bench: Bench) -> list[Figure]:
    """The process's highest resident size less that before the transaction."""
    rows = bench.scaled(1_000_000)
    growth = [growth_over(bench.shop(), rows) for _ in range(bench.rounds)]
    return [Figure(f"memory growth, a transaction of {rows:,} rows", growth, "MB", 100)]


def growth_over(dsn: str, rows: int) -> float:
    """Megabytes, of a process that has just begun to listen."""
    with Child(__name__, dsn, rows) as listener:
        before: float = listener.hear()
        connection = connect(dsn)
        execute(connection, INSERT_MANY, (rows,))
        connection.close()
        after: float = listener.hear()
    return after - before


def _listen(dsn: str, rows: int) -> None:
    counter = Counter()
    counter.expect(rows)
    with watching(dsn, counter):
        say(megabytes("VmRSS"))
        counter.wait()
        say(megabytes("VmHWM"))
    counter.check()


if __name__ == "__main__":
    _listen(sys.argv[1], int(sys.argv[2]))
