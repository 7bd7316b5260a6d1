"""Options that several commands have: the database, the namespace, what to watch."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from psycopg2.extensions import cursor as Cursor

from pgsignals.connection import connect
from pgsignals.errors import ModelError, near
from pgsignals.resolvers.plain import parse_name
from pgsignals.watchers import DEFAULT_OPERATIONS, OPERATIONS, Watcher, normalize, watch

F = TypeVar("F", bound=Callable[..., Any])

# What --app gives, or a framework's commands in its place.
App = str | Sequence[Watcher] | None

# A colon within double quotes belongs to the name.
_WATCH = re.compile(r'((?:"(?:[^"]|"")*"|[^":])+)(?::([^:"]*))?')


@dataclass(frozen=True)
class Watched:
    """A WATCH argument: a table's name as it was written, and operations."""

    table: str
    ops: tuple[str, ...] = DEFAULT_OPERATIONS


def parse_watched(text: str) -> Watched:
    """Read ``orders``, ``users:updated``, ``sales.orders:inserted,deleted``.

    Raises click.BadParameter for anything else.
    """
    found = _WATCH.fullmatch(text)
    if found is None:
        raise click.BadParameter(
            f"{text!r}: write TABLE or TABLE:OPERATION,…, with double quotes around a part of the "
            "name that has a dot, a quote or a colon in it."
        )
    table, listed = found.groups()
    try:
        parse_name(table)
    except ModelError as error:
        raise click.BadParameter(str(error)) from error
    if listed is None:
        return Watched(table)
    ops = tuple(op.strip() for op in listed.split(","))
    for op in ops:
        if op not in OPERATIONS:
            raise click.BadParameter(
                f"{text!r} has the unknown operation {op!r}{near(op, OPERATIONS)} "
                f"Operations are {', '.join(OPERATIONS)}."
            )
    if len(set(ops)) != len(ops):
        raise click.BadParameter(f"{text!r} names an operation twice.")
    return Watched(table, ops)


def parse_names(text: str) -> tuple[str, ...]:
    """Read column names, separated by commas. Raises click.BadParameter when one is empty."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise click.BadParameter(f"{text!r}: give column names, separated by commas.")
    return names


def database_options(function: F) -> F:
    """``--dsn`` and ``--namespace``."""
    for option in (
        click.option(
            "--namespace",
            default="default",
            show_default=True,
            help="Whose triggers: as start(namespace=…).",
        ),
        click.option(
            "--dsn",
            default="",
            envvar="PGSIGNALS_DSN",
            show_envvar=True,
            help="A connection string; what it leaves out comes from libpq's PG… variables.",
        ),
    ):
        function = option(function)
    return function


def delivery_option(function: F) -> F:
    """``--delivery``."""
    option = click.option(
        "--delivery",
        type=click.Choice(("notify", "outbox")),
        default="notify",
        show_default=True,
        help="As start(delivery=…): triggers that notify, or that write to the outbox.",
    )
    return option(function)


def app_option(function: F) -> F:
    """``--app``."""
    option = click.option(
        "--app",
        metavar="MODULE:OBJECT",
        help="Take watchers from code: a list, a function that returns one, or anything with an "
        "attribute WATCHERS. Modules are found from the current directory too.",
    )
    return option(function)


def watcher_options(function: F) -> F:
    """``WATCH …`` and ``--app``."""
    argument = click.argument("watched", metavar="[WATCH]...", nargs=-1, type=parse_watched)
    return app_option(argument(function))


def given_watchers(
    watched: Sequence[Watched], app: App, *, required: bool = True
) -> tuple[Watcher, ...]:
    """The watchers of WATCH arguments and ``--app`` together.

    Raises click.UsageError when there are none though they are ``required``.
    """
    found = [watch(each.table, *each.ops) for each in watched] + load_app(app)
    if required and not found:
        raise click.UsageError("Give what to watch: WATCH arguments such as 'orders', or --app.")
    return normalize(found)


def load_app(app: App) -> list[Watcher]:
    """The watchers that ``--app`` names, or that are given themselves; none without it.

    Raises click.ClickException when they cannot be had.
    """
    if app is None:
        return []
    if not isinstance(app, str):
        return list(app)
    module_name, _, path = app.partition(":")
    # As `python -m` does it; the script that runs has its own folder there instead.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for name in filter(None, path.split(".")):
            found = getattr(found, name)
        if hasattr(found, "WATCHERS"):
            found = found.WATCHERS
        if callable(found) and not isinstance(found, type):
            found = found()
    # Whatever the user's code raises: it is theirs to mend, and the message says where it was.
    except Exception as error:
        raise click.ClickException(f"--app {app}: {type(error).__name__}: {error}") from error
    if isinstance(found, Watcher):
        found = [found]
    if not isinstance(found, list | tuple | set | frozenset):
        raise click.ClickException(
            f"--app {app} gives {found!r:.80}, not a list of watchers: name a list, a function "
            "that returns one, or something with an attribute WATCHERS."
        )
    return list(normalize(found))


@contextmanager
def opened(dsn: str) -> Iterator[Cursor]:
    """A cursor of a new connection in autocommit mode."""
    connection = connect(dsn)
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()
