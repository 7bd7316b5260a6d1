"""``python -m benchmarks`` measures the figures and prints a table of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import bulk, growth, latency, memory, single, subscriptions, writers
from .harness import Figure, Options, table, throwaway_server, versions
from .plots import line_plot

# A row is one line here and one module: it takes the options and gives its figures.
ROWS: dict[str, Callable[[Options], list[Figure]]] = {
    "bulk": bulk.measure,
    "single": single.measure,
    "writers": writers.measure,
    "latency": latency.measure,
    "subscriptions": subscriptions.measure,
    "memory": memory.measure,
    "growth-rows": growth.by_rows,
    "growth-watchers": growth.by_watchers,
}


def _record(figure: Figure) -> dict[str, Any]:
    found: dict[str, Any] = {
        "figure": figure.what.strip(),
        "median": figure.median,
        "rounds": list(figure.values),
        "unit": figure.unit,
    }
    if figure.target is not None:
        found |= {"target": figure.target, "at_most": figure.at_most, "met": figure.met}
    if figure.plot is not None:
        found["plot"] = {name: list(points) for name, points in figure.plot.series.items()}
    return found


def save(folder: Path, what: str, results: dict[str, Iterable[Figure]]) -> None:
    """Write ``results.json`` and the plots into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "versions": what,
        "rows": {name: [_record(figure) for figure in each] for name, each in results.items()},
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    for figures in results.values():
        for figure in figures:
            if (plot := figure.plot) is not None:
                svg = line_plot(plot.title, plot.x_label, plot.y_label, plot.series)
                (folder / f"{plot.name}.svg").write_text(svg, encoding="utf-8")


def main() -> int:
    """Measure what was asked for. A target that is missed is printed, and fails nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="the same")
    parser.add_argument("--rounds", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the load, in 3 rounds")
    parser.add_argument(
        "--output", type=Path, default=Path("build/bench"), help="folder for JSON and plots"
    )
    arguments = parser.parse_args()
    names = [*arguments.names, *arguments.only] or list(ROWS)
    if unknown := set(names) - set(ROWS):
        parser.error(f"no benchmark {sorted(unknown)}; there are {', '.join(ROWS)}")
    if arguments.rounds < 1:
        parser.error("--rounds is a whole number from 1")
    options = Options(3 if arguments.quick else arguments.rounds, arguments.quick)
    with throwaway_server() as server:
        what = versions(server)
    print(what, flush=True)
    results: dict[str, Iterable[Figure]] = {}
    missed = 0
    for name in names:
        figures = ROWS[name](options)
        print(f"\n{table(figures)}", flush=True)
        missed += sum(not figure.met for figure in figures)
        results[name] = figures
        save(arguments.output, what, results)
    print(f"\n{missed} targets missed" if missed else "\nall targets met")
    print(f"results and plots: {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
