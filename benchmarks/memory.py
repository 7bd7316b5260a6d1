"""How much the listening process grows while a transaction of 1,000,000 rows arrives (Linux)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .bulk import INSERT
from .harness import Counter, Figure, Options, connect, execute, shop, throwaway_server, watching


def measure(options: Options) -> list[Figure]:
    """The process's highest resident size less that before the transaction."""
    rows = options.scaled(1_000_000)
    growth = []
    with throwaway_server() as server:
        for _ in range(options.rounds):
            growth.append(_growth(shop(server), rows))
    return [Figure(f"memory growth, a transaction of {rows:,} rows", growth, "MB", 100)]


def _growth(dsn: str, rows: int) -> float:
    listener = subprocess.Popen(
        [sys.executable, "-m", __name__, dsn, str(rows)], stdout=subprocess.PIPE, text=True
    )
    with listener:
        assert listener.stdout is not None
        before = float(listener.stdout.readline())
        connection = connect(dsn)
        execute(connection, INSERT, (rows,))
        connection.close()
        return float(listener.stdout.readline()) - before


def _listen(dsn: str, rows: int) -> None:
    counter = Counter()
    counter.expect(rows)
    with watching(dsn, counter):
        print(_megabytes("VmRSS"), flush=True)
        counter.wait()
        print(_megabytes("VmHWM"), flush=True)


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(f"{field}:"))
    return int(found.split()[1]) / 1024


if __name__ == "__main__":
    _listen(sys.argv[1], int(sys.argv[2]))
