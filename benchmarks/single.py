"""One client that inserts one row at a time: what watching adds to each INSERT."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

from .baselines import ROW_TRIGGER, select_loop
from .harness import (
    INSERT_ONE,
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


class _Side:
    def __init__(self, dsn: str, inserts: int) -> None:
        self._connection = connect(dsn)
        self._inserts = inserts

    def run(self) -> float:
        """The median of the INSERTs, in microseconds."""
        execute(self._connection, "TRUNCATE orders")
        took = []
        with self._connection.cursor() as cursor:
            for _ in range(self._inserts):
                began = time.perf_counter()
                cursor.execute(INSERT_ONE)
                took.append(time.perf_counter() - began)
        return 1e6 * statistics.median(took)

    def close(self) -> None:
        self._connection.close()


def measure(options: Options) -> list[Figure]:
    """How long an INSERT of one row takes; fsync is off, since a disk would hide the triggers."""
    with ExitStack() as stack:
        server = stack.enter_context(throwaway_server())
        dsns = {
            "unwatched": shop(server),
            "watched": shop(server),
            "row trigger": shop(server, ROW_TRIGGER),
        }
        sides = {name: _Side(dsn, options.scaled(3_000)) for name, dsn in dsns.items()}
        for side in sides.values():
            stack.callback(side.close)
        stack.enter_context(watching(dsns["watched"], Counter()))
        stack.enter_context(select_loop(dsns["row trigger"], Counter()))
        took = interleave(options.rounds, {name: side.run for name, side in sides.items()})
    return [
        Figure(
            "INSERT of one row, watched ÷ unwatched",
            ratios(took["watched"], took["unwatched"]),
            "",
        ),
        Figure("  the same with a row trigger", ratios(took["row trigger"], took["unwatched"]), ""),
        Figure("  unwatched", took["unwatched"], "µs"),
        Figure("  watched", took["watched"], "µs"),
    ]
