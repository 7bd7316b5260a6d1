"""``python -m benchmarks`` measures the figures and prints a table of them."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from . import (
    bulk,
    catchup,
    debezium,
    durable_latency,
    growth,
    install,
    latency,
    memory,
    relay,
    single,
    subscriptions,
    writers,
)
from .harness import Bench, Figure, Unavailable
from .report import Results, Row, machine, now, publish, table

# A row is one line here and one function: it takes the run and gives its figures.
ROWS: dict[str, Callable[[Bench], list[Figure]]] = {
    "bulk": bulk.measure,
    "bulk-partitioned": bulk.partitioned,
    "install": install.measure,
    "single": single.measure,
    "writers": writers.measure,
    "writers-few": writers.few,
    "latency": latency.measure,
    "durable-latency": durable_latency.measure,
    "subscriptions": subscriptions.measure,
    "memory": memory.measure,
    "catch-up": catchup.measure,
    "relay-kafka": relay.kafka,
    "relay-nats": relay.nats,
    "relay-debezium": debezium.measure,
    "growth-rows": growth.by_rows,
    "growth-watchers": growth.by_watchers,
    "growth-writers": growth.by_writers,
    "growth-subscriptions": growth.by_subscriptions,
    "growth-processes": growth.by_processes,
}


def _chosen(names: list[str]) -> list[str]:
    """The rows of these names; of ``growth``, those that begin so. Raises KeyError."""
    found: list[str] = []
    for name in names:
        matching = [row for row in ROWS if row == name or row.startswith(f"{name}-")]
        if not matching:
            raise KeyError(name)
        found += [row for row in matching if row not in found]
    return found


def _measure(name: str, bench: Bench) -> Row:
    began = time.monotonic()
    row = Row(now(), os.getloadavg()[0], 0.0, bench.rounds, bench.quick)
    try:
        row.figures = ROWS[name](bench)
    except Unavailable as reason:
        row.problem = f"skipped: {reason}"
    # One row that fails must not cost the others their results.
    except Exception as error:
        row.problem = f"failed: {type(error).__name__}: {error}"
    bench.tidy()
    row.seconds = time.monotonic() - began
    return row


def main() -> int:
    """Measure what was asked for.

    A target that is missed is printed, and fails nothing; the status is 1 when a row could not be
    measured, or other events came than were written.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"growth, {', '.join(ROWS)}")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="the same")
    parser.add_argument("--rounds", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the load, in 2 rounds")
    parser.add_argument(
        "--output", type=Path, default=Path("build/bench"), help="folder for the results"
    )
    parser.add_argument(
        "--publish", type=Path, metavar="FOLDER", help="copy the results there; measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.publish is not None:
        try:
            for path in publish(arguments.output, arguments.publish):
                print(path)
        except FileNotFoundError as error:
            parser.error(f"there are no results: {error}")
        return 0
    try:
        names = _chosen([*arguments.names, *arguments.only]) or list(ROWS)
    except KeyError as error:
        parser.error(f"no benchmark {error}; there are growth, {', '.join(ROWS)}")
    if arguments.rounds < 1:
        parser.error("--rounds is a whole number from 1")
    began = time.monotonic()
    measured: list[Row] = []
    with Bench(2 if arguments.quick else arguments.rounds, arguments.quick) as bench:
        results = Results.load(arguments.output, machine(bench.server))
        print(results.machine, flush=True)
        for name in names:
            row = _measure(name, bench)
            print(f"\n{name}, {row.seconds:.0f} s", flush=True)
            print(row.problem or table(row.figures), flush=True)
            measured.append(row)
            # In the order of the suite, whatever was measured first.
            rows = {**results.rows, name: row}
            results.rows = {each: rows[each] for each in ROWS if each in rows}
            results.save(arguments.output)
    missed = sum(not figure.met for row in measured for figure in row.figures)
    print(f"\n{missed} targets missed" if missed else "\nall targets met", end="")
    print(f", {time.monotonic() - began:.0f} s; results and plots: {arguments.output}")
    return int(any(row.problem.startswith("failed") for row in measured))


if __name__ == "__main__":
    raise SystemExit(main())
