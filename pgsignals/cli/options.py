"""Options that several commands have: the database, the namespace, what to watch."""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_args

import click
from psycopg2.extensions import cursor as Cursor

from pgsignals.core.errors import ModelError, near
from pgsignals.core.redaction import described
from pgsignals.core.transport import Capture, Transport
from pgsignals.core.watchers import DEFAULT_OPERATIONS, OPERATIONS, Watcher, normalize, watch
from pgsignals.hub.options import all_resolvers
from pgsignals.triggers.definitions import Definition, define
from pgsignals.triggers.resolvers.plain import parse_name

F = TypeVar("F", bound=Callable[..., Any])

# The value of --app, or the watchers that a framework's commands give in its place.
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
    """Read column names, separated by commas. Raises click.BadParameter if one is empty."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise click.BadParameter(f"{text!r}: give column names, separated by commas.")
    return names


dsn_option = click.option(
    "--dsn",
    default="",
    envvar="PGSIGNALS_DSN",
    show_envvar=True,
    help="A connection string; what it leaves out comes from libpq's PG… variables.",
)
namespace_option = click.option(
    "--namespace",
    default="default",
    show_default=True,
    help="Whose triggers: as start(namespace=…).",
)
delivery_option = click.option(
    "--delivery",
    type=click.Choice([each.value for each in Transport]),
    callback=lambda ctx, option, value: Transport(value),
    default="notify",
    show_default=True,
    help="As start(delivery=…): triggers that notify, that write to the outbox, or the write-ahead "
    "log.",
)
capture_option = click.option(
    "--capture",
    type=click.Choice(get_args(Capture)),
    help="With --delivery wal, as start(capture=…): rows alone, or messages of triggers alone.",
)
app_option = click.option(
    "--app",
    metavar="MODULE:OBJECT",
    help="Take watchers from code: a list, a function that returns one, or anything with an "
    "attribute WATCHERS. Modules are found from the current directory too.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def database_options(function: F) -> F:
    """Give a command the options ``--dsn`` and ``--namespace``."""
    return dsn_option(namespace_option(function))


@dataclass(frozen=True)
class Scope:
    """The database, the triggers there and the watchers that a command is about."""

    watched: tuple[Watched, ...]
    app: App
    delivery: Transport
    capture: Capture | None
    dsn: str
    namespace: str

    def watchers(self, *, required: bool = True) -> tuple[Watcher, ...]:
        """Return the watchers: see ``given_watchers``."""
        return given_watchers(self.watched, self.app, required=required)

    def define(self, cursor: Cursor, watchers: Sequence[Watcher]) -> list[Definition]:
        """Return the triggers that watchers need."""
        return define(
            cursor,
            watchers,
            all_resolvers(()),
            self.namespace,
            self.delivery,
            capture=self.capture,
        )


def scope_options(function: Callable[..., object]) -> Callable[..., object]:
    """Give a command a Scope, and the options that make it: ``WATCH …``, ``--app`` and so on."""

    @functools.wraps(function)
    def call(**given: Any) -> object:
        scope = Scope(**{each.name: given.pop(each.name) for each in fields(Scope)})
        if scope.capture is not None and scope.delivery is not Transport.WAL:
            raise click.UsageError("--capture is of WAL delivery: add --delivery wal.")
        return function(scope, **given)

    argument = click.argument("watched", metavar="[WATCH]...", nargs=-1, type=parse_watched)
    return app_option(argument(delivery_option(capture_option(database_options(call)))))


def given_watchers(
    watched: Sequence[Watched], app: App, *, required: bool = True
) -> tuple[Watcher, ...]:
    """Return the watchers of WATCH arguments and ``--app`` together.

    Raises click.UsageError if there are none though they are ``required``.
    """
    found = [watch(each.table, *each.ops) for each in watched] + load_app(app)
    if required and not found:
        raise click.UsageError("Give what to watch: WATCH arguments such as 'orders', or --app.")
    return normalize(found)


class _WrongApp(click.ClickException):
    """An error of ``--app``, which is told in one line, without the usage."""

    exit_code = 2


def load_app(app: App) -> list[Watcher]:
    """Return the watchers that ``--app`` names, or that are given themselves; none without it.

    Raises click.ClickException, with the exit code of a wrong command line, if they cannot be
    loaded.
    """
    if app is None:
        return []
    if not isinstance(app, str):
        return list(app)
    module_name, _, path = app.partition(":")
    # As `python -m` does; a script has its own folder there instead.
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
    # Whatever the user's code raises is theirs to mend, and the message says where it was.
    except Exception as error:
        raise _WrongApp(f"--app {app}: {described(error)}") from error
    if isinstance(found, Watcher):
        found = [found]
    if not isinstance(found, list | tuple | set | frozenset):
        raise _WrongApp(
            f"--app {app} gives {found!r:.80}, not a list of watchers: name a list, a function "
            "that returns one, or something with an attribute WATCHERS."
        )
    return list(normalize(found))
