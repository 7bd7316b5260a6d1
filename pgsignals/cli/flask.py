"""``flask pgsignals``: the commands for the database and the watchers of a Flask application."""

from __future__ import annotations

import click
from flask import current_app
from flask.cli import AppGroup, with_appcontext

from pgsignals.contrib.flask.extension import Process, process_of
from pgsignals.hub.options import Options

from . import main
from .embedded import commands_for
from .groups import ErrorsAsMessages, log_to_stderr

_BIND_KEY = "pgsignals.bind_key"


class _Group(ErrorsAsMessages, AppGroup):
    """A group of commands of Flask."""


@click.group("pgsignals", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Tell each step on stderr.")
@click.option(
    "--bind",
    "bind_key",
    metavar="KEY",
    help="The database of this key in SQLALCHEMY_BINDS, that of a PgSignals(bind_key=KEY).",
)
@click.pass_context
def group(ctx: click.Context, verbose: bool, bind_key: str | None) -> None:
    """Signals from PostgreSQL: triggers, events, and a process that listens.

    The database, the namespace and the watchers are those of the application: its PGSIGNALS_…
    settings and its PgSignals.

    \b
    Examples:
      flask pgsignals status
      flask pgsignals watch
      flask pgsignals watch orders:updated --json
      flask pgsignals run
    """
    log_to_stderr(ctx, verbose)
    ctx.meta[_BIND_KEY] = bind_key


def _process() -> Process:
    return process_of(None, click.get_current_context().meta.get(_BIND_KEY))


def _application() -> Options:
    return _process().settings()


def _in_context(command: click.Command) -> None:
    assert command.callback is not None
    command.callback = with_appcontext(command.callback)
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _in_context(each)


assert isinstance(main, click.Group)
for name, command in commands_for(main, _application, "flask pgsignals").items():
    _in_context(command)
    group.add_command(command, name)


@group.command("run", with_appcontext=True)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="How many seconds receivers have, at the end, for what has arrived.",
)
@click.pass_context
def run(ctx: click.Context, timeout: float) -> None:
    """Listen, and call the receivers, in a process of its own.

    For what shall happen once and not in each process that serves. It ends at Ctrl-C or SIGTERM,
    when receivers have handled what has arrived.

    Exit codes: 0 well, 1 an error, or receivers still at work after --timeout seconds.
    """
    hub = _process().start()
    click.echo(f"Listening for {current_app.name!r}. Press Ctrl-C to stop.", err=True)
    ctx.exit(0 if hub.run(timeout) else 1)
