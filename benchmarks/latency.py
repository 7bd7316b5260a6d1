"""How long after an INSERT has returned its receiver is called; the writer is another process."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from . import pubsub
from .baselines import (
    ROW_TRIGGER,
    asyncpg_listener,
    psycopg_notifies,
    select_loop,
    select_loop_with_worker,
)
from .harness import Bench, Counter, Figure, connect, execute, interleave, percentile, watching
from .processes import Child, hear, say

# Between two INSERTs, in milliseconds, so that none waits for the one before.
PAUSE = 2.0


class Clock(Counter):
    """A receiver that notes when it was called; the clock is the same in all processes."""

    def __init__(self) -> None:
        super().__init__()
        self._times: list[float] = []

    def __call__(self, event: object) -> None:
        self._times.append(time.monotonic())
        super().__call__(event)

    def take(self) -> list[float]:
        """The times of all calls that were expected, which are then forgotten."""
        self.wait()
        times, self._times = self._times, []
        return times


@dataclass
class Side:
    """Listens in this process to what another one inserts; keeps all it saw, in milliseconds.

    ``used`` has the microseconds of processor time that this process took for each event.
    """

    dsn: str
    inserts: int
    listening: Callable[[str, Callable[[object], object]], AbstractContextManager[None]]
    after_return: list[float] = field(default_factory=list)
    after_sending: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)

    def run(self) -> float:
        """The median of this round."""
        clock = Clock()
        clock.expect(self.inserts)
        with (
            self.listening(self.dsn, clock),
            writer(self.dsn, "orders", self.inserts, PAUSE) as insert,
        ):
            used = time.process_time()
            written = insert()
            called = clock.take()
            self.used.append(1e6 * (time.process_time() - used) / self.inserts)
        for at, (sent, returned) in zip(called, written, strict=True):
            self.after_return.append(1000 * (at - returned))
            self.after_sending.append(1000 * (at - sent))
        return percentile(self.after_return[-self.inserts :], 50)


@contextmanager
def writer(
    dsn: str, table: str, inserts: int, pause: float, *, synchronous: bool = False
) -> Iterator[Callable[[], list[tuple[float, float]]]]:
    """Another process, which inserts rows once it is called.

    The call returns when each INSERT was sent, and when it had returned. ``pause`` milliseconds,
    half as many or half more, are between two. ``synchronous``: each waits for the disk.
    """
    commit = "on" if synchronous else "off"
    with Child(__name__, dsn, table, inserts, pause, commit) as child:
        child.hear()

        def insert() -> list[tuple[float, float]]:
            child.tell()
            return [(sent, returned) for sent, returned in child.hear()]

        yield insert


def measure(bench: Bench) -> list[Figure]:
    """Median and 99th percentile, ours and those of a row trigger with a bare select() loop.

    They are taken over the INSERTs of all rounds: in a whole round the scheduler may choose to run
    the listener before the writer, so that receivers are called before INSERT returns.
    """
    inserts = bench.scaled(1_000)
    ours = Side(bench.shop(), inserts, watching)
    bare = Side(bench.shop(ROW_TRIGGER), inserts, select_loop)
    peers = {
        "the loop and a worker thread": Side(
            bench.shop(ROW_TRIGGER), inserts, select_loop_with_worker
        ),
        "psycopg 3's notifies()": Side(bench.shop(ROW_TRIGGER), inserts, psycopg_notifies),
        "asyncpg's listener": Side(bench.shop(ROW_TRIGGER), inserts, asyncpg_listener),
        "django-pgpubsub": Side(bench.shop(), inserts, pubsub.listening),
    }
    sides = {"ours": ours, "bare": bare, **peers}
    interleave(bench.rounds, {name: side.run for name, side in sides.items()}, warm_up=False)
    figures = []
    for since, mine, theirs, target in (
        ("INSERT returned", ours.after_return, bare.after_return, 1.3),
        ("INSERT sent", ours.after_sending, bare.after_sending, None),
    ):
        for percent in (50, 99):
            p_mine, p_theirs = percentile(mine, percent), percentile(theirs, percent)
            figures += [
                Figure(
                    f"{since} to receiver, p{percent}, ours ÷ bare", [p_mine / p_theirs], "", target
                ),
                Figure("  ours", [p_mine], "ms"),
                Figure("  bare select() loop", [p_theirs], "ms"),
            ]
            for name, side in peers.items():
                values = side.after_return if since == "INSERT returned" else side.after_sending
                figures.append(Figure(f"  {name}", [percentile(values, percent)], "ms"))
    figures.append(Figure("processor time of the listener for an event, ours", ours.used, "µs"))
    others = {"bare select() loop": bare, **peers}
    figures += [Figure(f"  {name}", side.used, "µs") for name, side in others.items()]
    return figures


def _write(dsn: str, table: str, inserts: int, pause: float, commit: str) -> None:
    connection = connect(dsn)
    # Notifications are sent when the commit is on disk, or here at once: what follows is the same.
    execute(connection, f"SET synchronous_commit = {commit}")
    times = []
    say()
    hear()
    with connection.cursor() as cursor:
        for _ in range(inserts):
            sent = time.monotonic()
            cursor.execute(f"INSERT INTO {table} (customer_id, total) VALUES (7, 19.90)")
            times.append((sent, time.monotonic()))
            # Not in step with anything that polls.
            time.sleep(pause / 1000 * random.uniform(0.5, 1.5))
    connection.close()
    say(times)


if __name__ == "__main__":
    _write(*sys.argv[1:3], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
