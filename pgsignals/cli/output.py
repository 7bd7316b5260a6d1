"""The output of commands: events as lines and as JSON, tables, notices."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Sequence

import click

from pgsignals.core.events import Event
from pgsignals.core.json import to_json
from pgsignals.core.watchers import Watcher

_COLOURS = {
    "inserted": "green",
    "updated": "yellow",
    "deleted": "red",
    "truncated": "magenta",
    "snapshot": "cyan",
}
_LONGEST_VALUE = 120


class _Standing:
    """Lines at the end of the terminal of stderr, which stay there below what is printed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: tuple[str, ...] = ()

    def show(self, lines: Sequence[str]) -> None:
        """Show these lines, in place of the former ones."""
        with self._lock:
            self._write("", lines)

    def print(self, text: str) -> None:
        """Print a line above the standing ones."""
        with self._lock:
            if self._lines:
                self._write(f"{text}\n", self._lines)
            else:
                click.echo(text, err=True)

    def _write(self, text: str, lines: Sequence[str]) -> None:
        # Move up to the first of the standing lines, and clear to the end of the screen.
        up = f"\x1b[{len(self._lines)}F\x1b[J" if self._lines else ""
        self._lines = tuple(lines)
        click.echo(up + text + "".join(f"{line}\n" for line in lines), err=True, nl=False)


standing = _Standing()


def notice(text: str) -> None:
    """Print a line on stderr, so that stdout has nothing but results."""
    standing.print(printable(text, "\n"))


def examples(*lines: str) -> str:
    """Return the end of a command's help: command lines that work."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def coloured(text: str, colour: str) -> str:
    """Return ``text`` in a colour for terminals; click takes it away if stdout is none.

    Users who set NO_COLOR (https://no-color.org) have none.
    """
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=colour)


def listed(watchers: Sequence[Watcher]) -> str:
    """Return a text such as ``orders (inserted, updated), users (deleted)``."""
    ops: dict[str, list[str]] = {}
    for watcher in watchers:
        ops.setdefault(str(watcher), []).extend(watcher.ops)
    return ", ".join(f"{name} ({', '.join(each)})" for name, each in ops.items())


def amount(number: int, noun: str) -> str:
    """Return a text such as ``1 event`` or ``2 events``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str, keep: str = "") -> str:
    """Return ``text`` without what could move a terminal's cursor: a row may hold anything."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def value_text(value: object) -> str:
    """Return a value's text: texts in quotes, NULL for None, shortened if it is long."""
    if value is None:
        return "NULL"
    text = repr(value) if isinstance(value, str | list | dict | tuple) else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def event_line(event: Event, unchanged: Collection[str] = ()) -> str:
    """Return ``12:00:00.123  public.orders  updated  id=7  status: 'new' → 'paid'``.

    An update's line has the values that differ, and those named in ``unchanged`` though they don't.
    """
    start = [
        event.at.astimezone().strftime("%H:%M:%S.%f")[:-3],
        printable(f"{event.schema}.{event.table}"),
        coloured(f"{event.op:<8}", _COLOURS[event.op]),
    ]
    parts = []
    if event.label is not None:
        parts.append(f"[{event.label}]")
    if event.id is not None:
        parts.append(f"id={value_text(event.id)}")
    new, old, changed = {**event.key, **event.values}, event.old, event.changed
    for name, value in new.items():
        if name in changed:
            parts.append(f"{name}: {value_text(old[name])} → {value_text(value)}")
        elif name in event.values and (event.op != "updated" or name in unchanged):
            parts.append(f"{name}={value_text(value)}")
    if event.truncated:
        parts.append("(the values are too long to travel)")
    if event.context:
        parts.append(f"context={value_text(dict(event.context))}")
    return "  ".join((*start, *map(printable, parts))).rstrip()


def emit(as_json: bool, answer: object, tell: str | Callable[[], object]) -> None:
    """Print an answer as one JSON object, or else ``tell``: a text, or a function that prints."""
    if as_json:
        click.echo(to_json(answer))
    elif isinstance(tell, str):
        click.echo(tell)
    else:
        tell()


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]], empty: str = "") -> None:
    """Print a table: rich's on a terminal if rich is installed, otherwise columns of plain text.

    Without rows, print the line ``empty``, if there is one. A cell of None is empty, too.
    """
    if empty and not rows:
        click.echo(empty)
        return
    cells = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass
        else:
            table = Table(*header)
            for row in cells:
                table.add_row(*map(Text, row))
            Console().print(table)
            return
    lines = [list(header), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def abandon_stdout() -> None:
    """Discard what is still in stdout's buffer, which nobody reads: it must not fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
