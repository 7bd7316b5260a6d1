"""How the cost of an event grows with the rows of a transaction and the watchers of a table."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack, closing

import pgsignals

from .baselines import ROW_TRIGGER, select_loop
from .bulk import INSERT
from .harness import (
    INSERT_ONE,
    Counter,
    Figure,
    Options,
    Plot,
    connect,
    execute,
    shop,
    throwaway_server,
    watching,
)

ROWS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
WATCHERS = (1, 3, 10, 30, 100)


def by_rows(options: Options) -> list[Figure]:
    """From the start of an INSERT to the last receiver's call, for each of its rows."""
    sizes = [size for size in ROWS if size <= options.scaled(1_000_000)]
    rounds = min(options.rounds, 3)
    found: dict[str, list[tuple[float, float]]] = {"pgsignals": [], "row trigger": []}
    with ExitStack() as stack:
        server = stack.enter_context(throwaway_server())
        sides = {"pgsignals": shop(server), "row trigger": shop(server, ROW_TRIGGER)}
        counters = {name: Counter() for name in sides}
        stack.enter_context(watching(sides["pgsignals"], counters["pgsignals"]))
        stack.enter_context(select_loop(sides["row trigger"], counters["row trigger"]))
        connections = {name: connect(dsn) for name, dsn in sides.items()}
        for connection in connections.values():
            stack.callback(connection.close)
        for size in sizes:
            took: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(rounds):
                for name, connection in connections.items():
                    execute(connection, "TRUNCATE orders")
                    counters[name].expect(size)
                    began = time.perf_counter()
                    execute(connection, INSERT, (size,))
                    took[name].append(1e6 * (counters[name].wait() - began) / size)
            for name, values in took.items():
                found[name].append((size, statistics.median(values)))
    most = f"{sizes[-1]:,}"
    plot = Plot("rows", "Cost of an event", "rows in a transaction", "µs for each event", found)
    return [
        Figure(f"an event among {most} rows", [found["pgsignals"][-1][1]], "µs", plot=plot),
        Figure("  the same with a row trigger", [found["row trigger"][-1][1]], "µs"),
    ]


def by_watchers(options: Options) -> list[Figure]:
    """The INSERT of one row into a table that many watchers watch."""
    inserts = options.scaled(1_000)
    points = []
    for number in WATCHERS:
        with ExitStack() as stack:
            server = stack.enter_context(throwaway_server())
            dsn = shop(server)
            counter = Counter()
            counter.expect(number * inserts)
            hub = stack.enter_context(pgsignals.Hub())
            labels = [f"watcher_{each}" for each in range(number)]
            hub.start(dsn, [pgsignals.watch("orders", "inserted", label=each) for each in labels])
            for label in labels:
                hub.subscribe(counter, label, "inserted")
            connection = stack.enter_context(closing(connect(dsn)))
            took = []
            for _ in range(inserts):
                began = time.perf_counter()
                execute(connection, INSERT_ONE)
                took.append(time.perf_counter() - began)
            counter.wait()
        points.append((float(number), 1e6 * statistics.median(took)))
    plot = Plot(
        "watchers", "INSERT of one row", "watchers of the table", "µs", {"pgsignals": points}
    )
    return [
        Figure("INSERT of one row with one watcher", [points[0][1]], "µs", plot=plot),
        Figure(f"  with {WATCHERS[-1]}", [points[-1][1]], "µs"),
    ]
