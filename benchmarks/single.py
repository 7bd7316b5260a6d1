"""One client that inserts one row at a time: what watching adds to each INSERT."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

from .baselines import ROW_TRIGGER, select_loop
from .harness import (
    INSERT_ONE,
    Bench,
    Counter,
    Figure,
    connect,
    consuming,
    execute,
    interleave,
    ratios,
    reading,
    watching,
)


class _Side:
    def __init__(self, dsn: str, inserts: int) -> None:
        self._connection = connect(dsn)
        # A disk would hide the triggers.
        execute(self._connection, "SET synchronous_commit = off")
        self._inserts = inserts
        self.counter: Counter | None = None

    def run(self) -> float:
        """The median of the INSERTs, in microseconds."""
        execute(self._connection, "TRUNCATE orders")
        if self.counter is not None:
            self.counter.expect(self._inserts)
        took = []
        with self._connection.cursor() as cursor:
            for _ in range(self._inserts):
                began = time.perf_counter()
                cursor.execute(INSERT_ONE)
                took.append(time.perf_counter() - began)
        if self.counter is not None:
            self.counter.wait()
        return 1e6 * statistics.median(took)

    def close(self) -> None:
        self._connection.close()


def measure(bench: Bench) -> list[Figure]:
    """How long an INSERT of one row takes, by the side's median of each round."""
    with ExitStack() as stack:
        dsns = {
            "unwatched": bench.shop(),
            "notify": bench.shop(),
            "outbox": bench.shop(),
            "wal": bench.shop(),
            "row trigger": bench.shop(ROW_TRIGGER),
        }
        sides = {name: _Side(dsn, bench.scaled(3_000)) for name, dsn in dsns.items()}
        for side in sides.values():
            stack.callback(side.close)
        for name, listen in (
            ("notify", watching),
            ("outbox", consuming),
            ("wal", reading),
            ("row trigger", select_loop),
        ):
            counter = sides[name].counter = Counter()
            stack.enter_context(listen(dsns[name], counter))
        took = interleave(bench.rounds, {name: side.run for name, side in sides.items()})
    return [
        Figure(
            "INSERT of one row, watched ÷ unwatched",
            ratios(took["notify"], took["unwatched"]),
            "",
        ),
        Figure("  the same in outbox delivery", ratios(took["outbox"], took["unwatched"]), ""),
        Figure("  the same in WAL delivery", ratios(took["wal"], took["unwatched"]), ""),
        Figure("  the same with a row trigger", ratios(took["row trigger"], took["unwatched"]), ""),
        Figure("  unwatched", took["unwatched"], "µs"),
        Figure("  watched", took["notify"], "µs"),
    ]
