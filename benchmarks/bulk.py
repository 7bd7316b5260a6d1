"""One statement that inserts 100,000 rows: what watching adds to it, and how soon all arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from .baselines import ROW_TRIGGER, select_loop
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
    watching,
)

INSERT = """
    INSERT INTO orders (customer_id, status, total)
    SELECT n %% 1000, 'new', n / 100.0 FROM generate_series(1, %s) AS n
"""


class _Side:
    """Inserts into one database, and keeps what each round took (in seconds)."""

    def __init__(self, dsn: str, rows: int) -> None:
        self._connection = connect(dsn)
        self._rows = rows
        self.delivered: list[float] = []
        self.counter: Counter | None = None

    def run(self) -> float:
        execute(self._connection, "TRUNCATE orders")
        if self.counter is not None:
            self.counter.expect(self._rows)
        began = time.perf_counter()
        execute(self._connection, INSERT, (self._rows,))
        statement = time.perf_counter() - began
        if self.counter is not None:
            self.delivered.append(self.counter.wait() - began)
        return statement

    def close(self) -> None:
        self._connection.close()


@contextmanager
def _sides(rows: int) -> Iterator[dict[str, _Side]]:
    with ExitStack() as stack:
        server = stack.enter_context(throwaway_server())
        dsns = {
            "unwatched": shop(server),
            "watched": shop(server),
            "row trigger": shop(server, ROW_TRIGGER),
        }
        sides = {name: _Side(dsn, rows) for name, dsn in dsns.items()}
        for side in sides.values():
            stack.callback(side.close)
        for name, listen in (("watched", watching), ("row trigger", select_loop)):
            counter = sides[name].counter = Counter()
            stack.enter_context(listen(dsns[name], counter))
        yield sides


def measure(options: Options) -> list[Figure]:
    """What the statement costs, and the events per second up to the last receiver's call."""
    rows = options.scaled(100_000)
    with _sides(rows) as sides:
        runs: dict[str, Callable[[], float]] = {name: side.run for name, side in sides.items()}
        took = interleave(options.rounds, runs)
        # The warm-up round was delivered too.
        ours, theirs = (sides[name].delivered[1:] for name in ("watched", "row trigger"))
    return [
        Figure(
            f"INSERT of {rows:,} rows, watched ÷ unwatched",
            ratios(took["watched"], took["unwatched"]),
            "",
            1.25,
        ),
        Figure(
            "  the same with a row trigger",
            ratios(took["row trigger"], took["unwatched"]),
            "",
        ),
        Figure("  unwatched", [1000 * seconds for seconds in took["unwatched"]], "ms"),
        Figure(
            f"INSERT of {rows:,} rows to last receiver called",
            [rows / seconds for seconds in ours],
            "events/s",
            150_000,
            at_most=False,
        ),
        Figure(
            "  row trigger and select() loop", [rows / seconds for seconds in theirs], "events/s"
        ),
        Figure("  ours ÷ that", ratios(theirs, ours), "", 2.5, at_most=False),
    ]
