"""``python -m benchmarks [--rounds N] [--quick] [NAME ...]`` prints a table of figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from . import bulk, latency, memory, single, subscriptions, writers
from .harness import Figure, Options, table, throwaway_server, versions

BENCHMARKS: dict[str, Callable[[Options], list[Figure]]] = {
    "bulk": bulk.measure,
    "single": single.measure,
    "writers": writers.measure,
    "latency": latency.measure,
    "subscriptions": subscriptions.measure,
    "memory": memory.measure,
}


def main() -> int:
    """Measure what was asked for; 1 if a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=7, help="of each side (default: 7)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the load, in 3 rounds")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {sorted(unknown)}; there are {', '.join(BENCHMARKS)}")
    if arguments.rounds < 1:
        parser.error("--rounds is a whole number from 1")
    options = Options(3 if arguments.quick else arguments.rounds, arguments.quick)
    with throwaway_server() as server:
        print(versions(server), flush=True)
    missed = 0
    for name in arguments.names or BENCHMARKS:
        figures = BENCHMARKS[name](options)
        print(f"\n{table(figures)}", flush=True)
        missed += sum(not figure.met for figure in figures)
    print(f"\n{missed} targets missed" if missed else "\nall targets met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
