"""How long after an INSERT has returned its receiver is called; the writer is another process."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from .baselines import ROW_TRIGGER, select_loop
from .harness import (
    DEADLINE,
    INSERT_ONE,
    Figure,
    Options,
    connect,
    interleave,
    ratios,
    shop,
    throwaway_server,
    watching,
)

PAUSE = 0.002  # between two INSERTs, in seconds, so that none waits for the one before


class _Clock:
    """A receiver that notes when it was called; the clock is the same in all processes."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._count = 0
        self._finished = threading.Event()

    def expect(self, count: int) -> None:
        self._times.clear()
        self._count = count
        self._finished.clear()

    def __call__(self, event: object) -> None:
        self._times.append(time.monotonic())
        if len(self._times) == self._count:
            self._finished.set()

    def wait(self) -> list[float]:
        if not self._finished.wait(DEADLINE):
            raise RuntimeError(f"{len(self._times)} of {self._count} events have come")
        return self._times


def _latencies(
    dsn: str,
    inserts: int,
    listening: Callable[[str, Callable[[object], object]], AbstractContextManager[None]],
) -> list[float]:
    """Milliseconds, in ascending order."""
    clock = _Clock()
    clock.expect(inserts)
    with listening(dsn, clock):
        writer = [sys.executable, "-m", __name__, dsn, str(inserts)]
        done = subprocess.run(writer, capture_output=True, text=True, check=True)
        called = clock.wait()
    returned = json.loads(done.stdout)
    return sorted(1000 * (c - r) for c, r in zip(called, returned, strict=True))


def measure(options: Options) -> list[Figure]:
    """Median and 99th percentile, ours and those of a row trigger with a bare select() loop."""
    inserts = options.scaled(3_000)
    percentiles: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}

    def run(name: str, side: Callable[[], list[float]]) -> float:
        found = side()
        percentiles[name].append((statistics.median(found), found[int(len(found) * 0.99)]))
        return 0.0

    with throwaway_server() as server:
        ours = partial(_latencies, shop(server), inserts, watching)
        bare = partial(_latencies, shop(server, ROW_TRIGGER), inserts, select_loop)
        interleave(
            options.rounds,
            {"ours": partial(run, "ours", ours), "bare": partial(run, "bare", bare)},
            warm_up=False,
        )
    figures = []
    for number, name in enumerate(("p50", "p99")):
        mine = [pair[number] for pair in percentiles["ours"]]
        theirs = [pair[number] for pair in percentiles["bare"]]
        figures += [
            Figure(f"latency {name}, ours ÷ bare select() loop", ratios(mine, theirs), "", 1.3),
            Figure("  ours", mine, "ms"),
            Figure("  bare select() loop", theirs, "ms"),
        ]
    return figures


def _write(dsn: str, inserts: int) -> None:
    connection = connect(dsn)
    returned = []
    with connection.cursor() as cursor:
        for _ in range(inserts):
            cursor.execute(INSERT_ONE)
            returned.append(time.monotonic())
            time.sleep(PAUSE)
    connection.close()
    json.dump(returned, sys.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dsn")
    parser.add_argument("inserts", type=int)
    arguments = parser.parse_args()
    _write(arguments.dsn, arguments.inserts)
