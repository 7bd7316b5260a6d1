"""``pgsignals demo``: live signals from a PostgreSQL of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from pgsignals.cli.demo_shop import Display, Seen, run
from pgsignals.core.events import Event
from pgsignals.core.transport import Transport
from pgsignals.testing import Server

from .interrupt import interruptible
from .options import delivery_option
from .output import amount, event_line, examples, notice, print_table

_TRY = "UPDATE products SET stock = stock + 1 WHERE name = 'teapot'"


@click.command(
    epilog=examples(
        "pgsignals demo", "pgsignals demo --seconds 10", "pgsignals demo --delivery wal"
    )
)
@click.option("--seconds", type=click.FloatRange(min=0), help="How long; until Ctrl-C otherwise.")
@delivery_option
def demo(seconds: float | None, delivery: Transport) -> None:
    """Show live signals from a small shop on a throwaway PostgreSQL.

    It uses the PostgreSQL of this machine if there is one, otherwise that of the extra
    pgsignals[demo], and leaves nothing behind.

    Exit codes: 0 well, also after Ctrl-C; 1 an error; 2 a wrong command line.
    """
    notice("Starting a throwaway PostgreSQL …")
    with interruptible() as end, _display() as display:
        seen = run(display, lambda: end.wait(seconds), delivery=delivery.value)
    click.echo()
    print_table(
        ("TABLE OR LABEL", "OPERATION", "EVENTS"),
        [(name, op, f"{number:,}") for (name, op), number in sorted(seen.events.items())],
    )
    latency = "" if seen.latency is None else f", {seen.latency * 1000:.1f} ms after the statement"
    click.echo(f"{amount(seen.total, 'event')}{latency} (median), {amount(seen.gaps, 'gap')}.")
    click.echo(
        f"{amount(seen.rolled_back, 'transaction')} rolled back, of which nothing was heard."
    )
    click.echo("The server and its data are gone.")


class _Lines:
    """Events as plain lines."""

    def ready(self, server: Server, dsn: str) -> None:
        click.echo(f"PostgreSQL {server.version} is running, and a shop is about to open.")
        click.echo(f'Take part from another terminal:\n\n    psql {dsn} -c "{_TRY}"\n')

    def event(self, event: Event, seen: Seen) -> None:
        click.echo(event_line(event))


class _Live(_Lines):
    """Events as lines that scroll above a table of counts; ``live`` is rich's Live."""

    def __init__(self, live: Any) -> None:
        self._live = live

    def ready(self, server: Server, dsn: str) -> None:
        # Before rich rules the terminal: it would break a long line, which is to be copied.
        super().ready(server, dsn)
        self._live.start()

    def event(self, event: Event, seen: Seen) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table("table or label", "inserted", "updated", "deleted")
        for name in sorted({name for name, _ in seen.events}):
            counts = (seen.events[name, op] for op in ("inserted", "updated", "deleted"))
            table.add_row(name, *(str(count or "") for count in counts))
        self._live.console.print(Text.from_ansi(event_line(event)), soft_wrap=True)
        self._live.update(table)


@contextmanager
def _display() -> Iterator[Display]:
    if sys.stdout.isatty():
        try:
            from rich.live import Live
        except ImportError:
            pass
        else:
            live = Live(transient=True, refresh_per_second=8)
            try:
                yield _Live(live)
            finally:
                live.stop()
            return
    yield _Lines()
