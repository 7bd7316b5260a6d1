"""What becomes of the figures: the printed table, results.json, a page for the docs, plots."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import msgspec

import pgsignals
from pgsignals.testing import Server

from .harness import Figure
from .plots import line_plot

_WIDTHS = (47, 16, 17, 9, 6)
_RESULTS = "results.json"
_PAGE = "results.md"


class Row(msgspec.Struct):
    """What one row of the suite gave: its figures, or in ``problem`` why there are none.

    ``load`` is how many processes wanted to run in the minute before, earlier rows' included.
    """

    at: str
    load: float
    seconds: float
    rounds: int
    quick: bool
    figures: list[Figure] = msgspec.field(default_factory=list)
    problem: str = ""


class Results(msgspec.Struct):
    """What is known by now, row by row; ``machine`` is what it was measured with."""

    machine: str
    rows: dict[str, Row] = msgspec.field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, machine: str) -> Results:
        """Those in ``folder``, if they are of this machine; others are begun anew."""
        try:
            found = msgspec.json.decode((folder / _RESULTS).read_bytes(), type=cls)
        except (FileNotFoundError, msgspec.MsgspecError):
            return cls(machine)
        return found if found.machine == machine else cls(machine)

    def save(self, folder: Path) -> None:
        """Write JSON, the page and the plots into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        text = msgspec.json.format(msgspec.json.encode(self), indent=1)
        (folder / _RESULTS).write_bytes(text + b"\n")
        (folder / _PAGE).write_text(page(self), encoding="utf-8")
        for row in self.rows.values():
            for figure in row.figures:
                if (plot := figure.plot) is not None:
                    svg = line_plot(plot.title, plot.x_label, plot.y_label, plot.series)
                    (folder / f"{plot.name}.svg").write_text(svg, encoding="utf-8")


def now() -> str:
    """The time, as results have it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def machine(server: Server) -> str:
    """What the figures are measured with."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except FileNotFoundError:
        pass
    return (
        f"{os.cpu_count()} cores ({model}), {platform.system()} {platform.release()}, "
        f"PostgreSQL {server.version}, Python {platform.python_version()}, "
        f"psycopg2 {version('psycopg2-binary')}, pgsignals {pgsignals.__version__}"
    )


def number(value: float) -> str:
    """Three digits, or all before the point."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def cells(figure: Figure) -> tuple[str, str, str, str, str]:
    """A line's texts: what, median, the range of the rounds, target, verdict."""
    bound = verdict = ""
    if figure.target is not None:
        bound = f"{'≤' if figure.at_most else '≥'} {number(figure.target)}"
        verdict = "ok" if figure.met else "MISSED"
    spread = ""
    if len(figure.values) > 1:
        spread = f"{number(min(figure.values))} … {number(max(figure.values))}"
    return figure.what, f"{number(figure.median)} {figure.unit}".strip(), spread, bound, verdict


def table(figures: Iterable[Figure]) -> str:
    """The figures as text in columns."""
    lines = [("figure", "median", "rounds", "target", ""), *map(cells, figures)]
    # Wide enough for all tables of a run to align.
    widths = [
        max(least, *map(len, column))
        for least, column in zip(_WIDTHS, zip(*lines, strict=True), strict=True)
    ]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def page(results: Results) -> str:
    """The results as Markdown: the figures that have a target, then all."""
    return "\n".join([*_page(results), ""])


def _page(results: Results) -> Iterator[str]:
    yield f"Measured with {results.machine}."
    quick = sorted(name for name, row in results.rows.items() if row.quick)
    if quick:
        yield ""
        yield f"**Smaller loads than the figures are meant for:** {', '.join(quick)}."
    yield ""
    yield "### Against the targets"
    yield ""
    yield from _lines(
        figure
        for row in results.rows.values()
        for figure in row.figures
        if figure.target is not None
    )
    for name, row in results.rows.items():
        if row.problem:
            yield f"| {name}: {row.problem} | | | | |"
    for name, row in results.rows.items():
        if row.figures:
            yield ""
            yield f"### {name}"
            yield ""
            yield f"{row.at}, {row.rounds} rounds, {row.seconds:.0f} s; load {row.load:.1f} before."
            yield ""
            yield from _lines(row.figures)


def _lines(figures: Iterable[Figure]) -> Iterator[str]:
    yield "| figure | median | rounds | target | |"
    yield "|---|---|---|---|---|"
    for figure in figures:
        what, median, spread, bound, verdict = cells(figure)
        # Lines that belong to the one above are indented in the printed table.
        what = f"&emsp;{what.strip()}" if what.startswith(" ") else what
        verdict = f"**{verdict.lower()}**" if verdict == "MISSED" else verdict
        yield f"| {what} | {median} | {spread} | {bound} | {verdict} |"


def publish(folder: Path, into: Path) -> list[Path]:
    """Copy the results from ``folder``; raises FileNotFoundError when there are none."""
    into.mkdir(parents=True, exist_ok=True)
    found = [folder / _RESULTS, folder / _PAGE, *sorted(folder.glob("*.svg"))]
    return [Path(shutil.copy(each, into)) for each in found]
