"""How costs grow: with rows, watchers, writers, subscriptions and listening processes."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack, closing
from functools import partial

import pgsignals

from . import writers
from .baselines import ROW_TRIGGER, select_loop
from .harness import (
    INSERT_MANY,
    INSERT_ONE,
    Bench,
    Counter,
    Figure,
    Plot,
    connect,
    execute,
    interleave,
    watching,
)
from .memory import growth_over
from .processes import Child, hear, say
from .subscriptions import Side as Subscribed

ROWS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
WATCHERS = (1, 3, 10, 30, 100)
WRITERS = (1, 2, 4, 8, 16, 32, 64)
SUBSCRIPTIONS = (10, 100, 1_000, 10_000, 100_000)
PROCESSES = (1, 2, 5, 10, 20, 50)

Points = list[tuple[float, float]]


def _points(bench: Bench, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Every other one where quickness counts more than truth."""
    return sizes[::2] if bench.quick else sizes


def _rounds(bench: Bench) -> int:
    """Fewer than elsewhere: a plot shows by its neighbours when a point is off."""
    return 1 if bench.quick else min(bench.rounds, 3)


def by_rows(bench: Bench) -> list[Figure]:
    """From the start of an INSERT to the last receiver's call, for each of its rows; memory."""
    sizes = [size for size in _points(bench, ROWS) if size <= bench.scaled(ROWS[-1])]
    found: dict[str, Points] = {"pgsignals": [], "row trigger": []}
    with ExitStack() as stack:
        dsns = {"pgsignals": bench.shop(), "row trigger": bench.shop(ROW_TRIGGER)}
        counters = {name: Counter() for name in dsns}
        stack.enter_context(watching(dsns["pgsignals"], counters["pgsignals"]))
        stack.enter_context(select_loop(dsns["row trigger"], counters["row trigger"]))
        connections = {name: stack.enter_context(closing(connect(d))) for name, d in dsns.items()}

        def run(name: str, size: int) -> float:
            execute(connections[name], "TRUNCATE orders")
            counters[name].expect(size)
            began = time.perf_counter()
            execute(connections[name], INSERT_MANY, (size,))
            return 1e6 * (counters[name].wait() - began) / size

        for size in sizes:
            took = interleave(
                1 if size == ROWS[-1] else _rounds(bench),
                {name: partial(run, name, size) for name in dsns},
                warm_up=False,
            )
            for name, values in took.items():
                found[name].append((size, statistics.median(values)))
    memory = [(size, max(0.1, growth_over(bench.shop(), size))) for size in sizes]
    most = f"{sizes[-1]:,}"
    cost = Plot("rows", "Cost of an event", "rows in a transaction", "µs for each event", found)
    grown = Plot(
        "memory",
        "Memory growth of the listening process",
        "rows in a transaction",
        "MB",
        {"pgsignals": memory},
    )
    return [
        Figure(f"an event among {most} rows", [found["pgsignals"][-1][1]], "µs", plot=cost),
        Figure("  the same with a row trigger", [found["row trigger"][-1][1]], "µs"),
        Figure(f"memory growth, {most} rows", [memory[-1][1]], "MB", plot=grown),
    ]


def by_watchers(bench: Bench) -> list[Figure]:
    """The INSERT of one row into a table that many watchers watch, and what an event costs us."""
    statement: Points = []
    event: Points = []
    for number in _points(bench, WATCHERS):
        inserts = max(20, bench.scaled(10_000) // (number + 10))
        took, used = _many_watchers(bench.shop(), number, inserts)
        statement.append((number, 1e6 * took))
        event.append((number, 1e6 * used / (number * inserts)))
    plot = Plot(
        "watchers",
        "INSERT of one row",
        "watchers of the table",
        "µs",
        {"INSERT": statement, "our CPU, an event": event},
    )
    return [
        Figure("INSERT of one row with one watcher", [statement[0][1]], "µs", plot=plot),
        Figure(f"  with {WATCHERS[-1]}", [statement[-1][1]], "µs"),
    ]


def _many_watchers(dsn: str, number: int, inserts: int) -> tuple[float, float]:
    """Seconds of the median INSERT, and our processor time in all."""
    with ExitStack() as stack:
        counter = Counter()
        counter.expect(number * inserts)
        hub = stack.enter_context(pgsignals.Hub())
        labels = [f"watcher_{each}" for each in range(number)]
        hub.start(dsn, [pgsignals.watch("orders", "inserted", label=each) for each in labels])
        for label in labels:
            hub.subscribe(counter, label, "inserted")
        connection = stack.enter_context(closing(connect(dsn)))
        execute(connection, "SET synchronous_commit = off")
        took = []
        used = time.process_time()
        for _ in range(inserts):
            began = time.perf_counter()
            execute(connection, INSERT_ONE)
            took.append(time.perf_counter() - began)
        counter.wait()
        used = time.process_time() - used
    return statistics.median(took), used


def by_writers(bench: Bench) -> list[Figure]:
    """The throughput of 1 to 64 clients, each way to learn of their rows."""
    sides = writers.sides(bench)
    names = {
        "unwatched": "unwatched",
        "notify": "notify",
        "outbox": "outbox",
        "row trigger": "row trigger",
    }
    found: dict[str, Points] = {name: [] for name in names}
    for clients in _points(bench, WRITERS):
        for name in names:
            found[name].append((clients, sides[name].run(clients, 1.0 if bench.quick else 2.0)))
    plot = Plot("writers", "Single-row writers", "clients", "transactions a second", found)
    return [
        Figure(f"{WRITERS[-1]} writers, unwatched", [found["unwatched"][-1][1]], "tps", plot=plot),
        *(Figure(f"  {name}", [found[name][-1][1]], "tps") for name in list(names)[1:]),
    ]


def by_subscriptions(bench: Bench) -> list[Figure]:
    """Our processor time for an event that one of many subscriptions to single records gets."""
    rows = bench.scaled(100_000)
    points: Points = []
    for number in _points(bench, SUBSCRIPTIONS):
        with closing(Subscribed(bench.shop(), number, rows)) as side:
            took = interleave(_rounds(bench), {"one": side.run}, warm_up=not bench.quick)
        points.append((number, statistics.median(took["one"])))
    plot = Plot(
        "subscriptions",
        "Cost of an event for one of many receivers",
        "subscriptions to single records",
        "µs of CPU for each event",
        {"pgsignals": points},
    )
    return [
        Figure(f"an event with {SUBSCRIPTIONS[0]} subscriptions", [points[0][1]], "µs", plot=plot),
        Figure(f"  with {SUBSCRIPTIONS[-1]:,}", [points[-1][1]], "µs"),
    ]


def by_processes(bench: Bench) -> list[Figure]:
    """One INSERT of one row, until the last of many processes has had its receiver called."""
    inserts = bench.scaled(200)
    found: dict[str, Points] = {"INSERT": [], "last receiver called": []}
    dsn = bench.shop()
    with ExitStack() as stack:
        listeners: list[Child] = []
        for number in _points(bench, PROCESSES):
            added = [
                stack.enter_context(Child(__name__, dsn)) for _ in range(number - len(listeners))
            ]
            for listener in added:
                listener.hear()
            listeners += added
            took, last = _tell_all(dsn, listeners, inserts)
            found["INSERT"].append((number, 1e3 * took))
            found["last receiver called"].append((number, 1e3 * last))
    most = int(found["INSERT"][-1][0])
    plot = Plot(
        "processes", "One row to many processes", "listening processes", "ms, median", found
    )
    return [
        Figure(
            "one row to the receiver of one process",
            [found["last receiver called"][0][1]],
            "ms",
            plot=plot,
        ),
        Figure(f"  to those of {most}", [found["last receiver called"][-1][1]], "ms"),
        Figure(f"  INSERT with {most}", [found["INSERT"][-1][1]], "ms"),
    ]


def _tell_all(dsn: str, listeners: list[Child], inserts: int) -> tuple[float, float]:
    """Median seconds of the INSERT, and from its sending to the last call of a receiver."""
    for listener in listeners:
        listener.tell(inserts)
        listener.hear()
    took, sent = [], []
    with closing(connect(dsn)) as connection:
        execute(connection, "SET synchronous_commit = off")
        for _ in range(inserts):
            sent.append(time.monotonic())
            execute(connection, INSERT_ONE)
            took.append(time.monotonic() - sent[-1])
            time.sleep(0.0005 * len(listeners))
    # Each listener fails unless it is called as often as rows are written.
    called = [listener.hear() for listener in listeners]
    last = [max(times) - at for at, *times in zip(sent, *called, strict=True)]
    return statistics.median(took), statistics.median(last)


def _listen(dsn: str) -> None:
    from .latency import Clock

    clock = Clock()
    with watching(dsn, clock):
        say()
        while (inserts := hear()) is not None:
            clock.expect(inserts)
            say()
            say(clock.take())


if __name__ == "__main__":
    _listen(sys.argv[1])
