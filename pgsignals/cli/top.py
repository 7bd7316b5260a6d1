"""``pgsignals top``: the state of a database's signals, again and again, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from pgsignals.core.errors import ConnectError, MissingExtraError
from pgsignals.core.json import to_json
from pgsignals.core.units import age_text, size_text
from pgsignals.overview.history import History
from pgsignals.overview.model import Overview
from pgsignals.overview.reader import Reader
from pgsignals.triggers.installer import INSTALLED

from .interrupt import interruptible
from .options import dsn_option, json_option
from .output import amount, examples, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 20
_STYLES = {
    "INSTALLED": "green",
    "STALE": "yellow",
    "OUTDATED": "red",
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
}


@click.command(epilog=examples("pgsignals top", "pgsignals top --once --json"))
@dsn_option
@click.option(
    "--every",
    type=click.FloatRange(min=2),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Look once, print, and end.")
@json_option
def top(dsn: str, every: float, once: bool, as_json: bool) -> None:
    """Show watchers, consumers, dead letters, backfills and findings, live.

    It shows what `pgsignals console` shows, installs nothing, and is no consumer. It ends at
    Ctrl-C or SIGTERM.

    Exit codes: 0 well; 1 the database cannot be read; 2 a wrong command line.
    """
    if as_json and not once:
        raise click.UsageError("--json prints one object: add --once.")
    reader = Reader(dsn)
    try:
        if once:
            overview = reader.read()
            if not overview.connected:
                raise ConnectError(overview.problem)
            click.echo(to_json(overview) if as_json else _text(overview), nl=as_json)
            return
        _follow(reader, every)
    finally:
        reader.close()


def _follow(reader: Reader, every: float) -> None:
    rich = _rich()
    history, elapsed = History(), 0.0
    with interruptible() as end, rich["Live"](screen=True, auto_refresh=False) as live:
        while True:
            overview = reader.read()
            reader.listen(True)
            if overview.connected:
                history.note(elapsed, overview.consumers)
            live.update(rich["Group"](*_screen(overview, history, elapsed)), refresh=True)
            if end.wait(every) is not None:
                return
            elapsed += every
            if reader.connection is not None:
                reader.hear()
                reader.events()


def _rich() -> dict[str, Any]:
    try:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MissingExtraError(
            "`pgsignals top` needs the package rich: pip install 'pgsignals[cli]'. "
            "`pgsignals top --once --json` does without."
        ) from error
    return {"Console": Console, "Group": Group, "Live": Live, "Table": Table, "Text": Text}


def _text(overview: Overview) -> str:
    """Return one look as text for whatever stdout is."""
    rich = _rich()
    console = rich["Console"]()
    with console.capture() as capture:
        for each in _screen(overview, History(), 0.0):
            console.print(each)
    return str(capture.get())


def _screen(overview: Overview, history: History, elapsed: float) -> Iterator[RenderableType]:
    """Yield what is on the screen, from top to bottom. Pure."""
    text = _rich()["Text"]
    head = text(
        f"{overview.database or 'no database'} at {overview.host or '?'} · {overview.server}"
        f" · {overview.at.astimezone():%H:%M:%S} · the notification queue is"
        f" {overview.queue_usage:.0%} full"
    )
    if overview.outbox is not None:
        head.append(f" · the outbox has {size_text(overview.outbox.bytes)}")
    yield head
    if overview.problem:
        yield text(printable(overview.problem), style="red" if not overview.connected else "yellow")
    for finding in overview.findings:
        if finding.level != "ok":
            line = text(f"{finding.level:<4}  ", style=_STYLES[finding.level])
            line.append(printable(f"{finding.check}: {finding.message}"), style="default")
            yield line
            yield text(f"      Fix: {printable(finding.fix)}", style="dim")
    yield from _consumers(overview, history, elapsed)
    letters = overview.dead_letters
    if letters.total:
        yield _table(
            amount(letters.total, "dead letter"),
            ("ID", "RECORD", "RECEIVER", "TRIES", "AGE", "ERROR"),
            [
                (
                    each.id,
                    f"{each.table} {each.op} {each.record}",
                    each.receiver,
                    each.attempts,
                    age_text((overview.at - each.at).total_seconds()),
                    each.error.partition("\n")[0],
                )
                for each in letters.latest[:5]
            ],
            numbers=("ID", "TRIES", "AGE"),
        )
    running = [each for each in overview.backfills if each.state == "running"]
    if running:
        yield _table(
            "Backfills",
            ("ID", "OF", "FOR", "DONE", "ROWS", ""),
            [
                (
                    each.id,
                    each.target,
                    each.consumer,
                    f"{share(each.done, each.total):.0%}",
                    f"{each.done:,} of {each.total:,}",
                    bar(share(each.done, each.total)),
                )
                for each in running
            ],
            numbers=("ID", "DONE", "ROWS"),
        )
    yield from _watchers(overview)


def _consumers(overview: Overview, history: History, elapsed: float) -> Iterator[RenderableType]:
    if not overview.consumers:
        return
    lags = history.lags(elapsed)
    yield _table(
        "Consumers and backends",
        ("NAME", "PROCESS", "EVENTS", "BYTES", "BEHIND", "LAST HOUR", "DEAD", ""),
        [
            (
                each.key,
                f"{each.host}:{each.pid}" if each.active else "—",
                "" if each.lag is None else f"{each.lag:,}{'' if each.counted else '+'}",
                size_text(each.lag_bytes),
                age_text(each.lag_seconds),
                sparkline([lag.seconds for _, lag in lags.get(each.key, [])]),
                each.dead_letters or "",
                each.reason,
            )
            for each in overview.consumers
        ],
        numbers=("EVENTS", "BYTES", "BEHIND", "DEAD"),
    )


def _watchers(overview: Overview) -> Iterator[RenderableType]:
    yield _table(
        amount(len(overview.watchers), "watcher"),
        ("STATE", "TABLE", "OPERATION", "DELIVERY", "NAMESPACE", "PER SECOND", ""),
        [
            (
                each.status,
                f"{each.schema}.{each.table or '—'}",
                each.op + (f" [{each.label}]" if each.label else ""),
                f"{each.delivery} ({each.served})" if each.served else each.delivery,
                each.namespace,
                "" if (rate := overview.rates.get(each.name)) is None else f"{rate:,.1f}",
                "; ".join(
                    filter(
                        None,
                        (each.detail, f"{len(each.twins) + 1} do the same" if each.twins else ""),
                    )
                ),
            )
            for each in sorted(overview.watchers, key=lambda each: each.status == INSTALLED)
        ],
        numbers=("PER SECOND",),
    )


def _table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    numbers: Sequence[str] = (),
) -> RenderableType:
    rich = _rich()
    table = rich["Table"](title=title, title_justify="left", box=None, pad_edge=False)
    for name in header:
        table.add_column(
            name,
            justify="right" if name in numbers else "left",
            no_wrap=name in numbers,
            overflow="fold",
        )
    for row in rows:
        cells = ["" if cell is None else printable(str(cell)) for cell in row]
        table.add_row(*(rich["Text"](cell, style=_STYLES.get(cell, "")) for cell in cells))
    found: RenderableType = table
    return found


def share(done: float, total: float) -> float:
    """Return the part that is done, 0 to 1."""
    return min(1.0, done / total) if total else 1.0


def bar(part: float) -> str:
    """Return a bar of ``_WIDTH`` characters."""
    full = round(part * _WIDTH)
    return "█" * full + "░" * (_WIDTH - full)


def sparkline(numbers: Sequence[float]) -> str:
    """Return the latest numbers as bars of a character each."""
    shown = numbers[-_WIDTH:]
    most = max(shown, default=0.0)
    if most <= 0:
        return _BARS[0] * len(shown)
    return "".join(_BARS[round(each / most * (len(_BARS) - 1))] for each in shown)
