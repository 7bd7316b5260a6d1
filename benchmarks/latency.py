"""How long after an INSERT has returned its receiver is called; the writer is another process."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from .baselines import ROW_TRIGGER, asyncpg_listener, psycopg_notifies, select_loop
from .harness import (
    DEADLINE,
    INSERT_ONE,
    Figure,
    Options,
    connect,
    interleave,
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


@dataclass
class _Side:
    """Listens in this process to what another one inserts; keeps all it saw, in milliseconds."""

    dsn: str
    inserts: int
    listening: Callable[[str, Callable[[object], object]], AbstractContextManager[None]]
    after_return: list[float] = field(default_factory=list)
    after_sending: list[float] = field(default_factory=list)

    def run(self) -> float:
        clock = _Clock()
        clock.expect(self.inserts)
        with self.listening(self.dsn, clock):
            writer = [sys.executable, "-m", __name__, self.dsn, str(self.inserts)]
            done = subprocess.run(writer, stdout=subprocess.PIPE, text=True, check=True)
            called = clock.wait()
        for at, (sent, returned) in zip(called, json.loads(done.stdout), strict=True):
            self.after_return.append(1000 * (at - returned))
            self.after_sending.append(1000 * (at - sent))
        return statistics.median(self.after_return[-self.inserts :])


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def measure(options: Options) -> list[Figure]:
    """Median and 99th percentile, ours and those of a row trigger with a bare select() loop.

    They are taken over the INSERTs of all rounds: in a whole round the scheduler may choose to run
    the listener before the writer, so that receivers are called before INSERT returns.
    """
    inserts = options.scaled(1_000)
    with throwaway_server() as server:
        ours = _Side(shop(server), inserts, watching)
        bare = _Side(shop(server, ROW_TRIGGER), inserts, select_loop)
        peers = {
            "psycopg 3's notifies()": _Side(shop(server, ROW_TRIGGER), inserts, psycopg_notifies),
            "asyncpg's listener": _Side(shop(server, ROW_TRIGGER), inserts, asyncpg_listener),
        }
        sides = {"ours": ours, "bare": bare, **peers}
        interleave(options.rounds, {name: side.run for name, side in sides.items()}, warm_up=False)
    figures = []
    for since, mine, theirs, target in (
        ("INSERT returned", ours.after_return, bare.after_return, 1.3),
        ("INSERT sent", ours.after_sending, bare.after_sending, None),
    ):
        for percent in (50, 99):
            p_mine, p_theirs = _percentile(mine, percent), _percentile(theirs, percent)
            figures += [
                Figure(
                    f"{since} to receiver, p{percent}, ours ÷ bare", [p_mine / p_theirs], "", target
                ),
                Figure("  ours", [p_mine], "ms"),
                Figure("  bare select() loop", [p_theirs], "ms"),
            ]
            for name, side in peers.items():
                values = side.after_return if since == "INSERT returned" else side.after_sending
                figures.append(Figure(f"  {name}", [_percentile(values, percent)], "ms"))
    return figures


def _write(dsn: str, inserts: int) -> None:
    connection = connect(dsn)
    times = []
    with connection.cursor() as cursor:
        for _ in range(inserts):
            sent = time.monotonic()
            cursor.execute(INSERT_ONE)
            times.append((sent, time.monotonic()))
            time.sleep(PAUSE)
    connection.close()
    json.dump(times, sys.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dsn")
    parser.add_argument("inserts", type=int)
    arguments = parser.parse_args()
    _write(arguments.dsn, arguments.inserts)
