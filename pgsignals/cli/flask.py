"""``flask pgsignals``: the commands for the database and the watchers of a Flask application."""

from __future__ import annotations

from typing import Any

import click
from flask import current_app
from flask.cli import AppGroup, with_appcontext

from pgsignals.contrib.flask.extension import process_of

from .doctor import doctor
from .groups import ErrorsAsMessages, log_to_stderr
from .install import install, uninstall
from .relay import relay
from .sql import sql
from .status import status
from .watch import watch

# What the application says in place of the command line.
_FROM_APP = frozenset({"app", "dsn", "namespace"})


class _Group(ErrorsAsMessages, AppGroup):
    """A group of commands of Flask."""


@click.group("pgsignals", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Tell each step on stderr.")
@click.pass_context
def group(ctx: click.Context, verbose: bool) -> None:
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


def _for_the_app(command: click.Command) -> click.Command:
    """A command of ``pgsignals`` that asks the application for what it is to work on.

    Without WATCH arguments that is all that the application watches.
    """
    call = command.callback
    assert call is not None

    @with_appcontext
    def callback(**given: Any) -> Any:
        settings = process_of(None).settings()
        watchers = () if given.get("watched") else settings.watchers
        values = {"app": watchers, "dsn": settings.dsn, "namespace": settings.namespace}
        return call(**given, **{name: values[name] for name in taken})

    taken = [each.name for each in command.params if each.name in _FROM_APP]
    return click.Command(
        command.name,
        params=[each for each in command.params if each.name not in _FROM_APP],
        callback=callback,
        help=command.help,
        context_settings=command.context_settings,
    )


for command in (doctor, install, relay, sql, status, uninstall, watch):
    group.add_command(_for_the_app(command))


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
    hub = process_of(None).start()
    click.echo(f"Listening for {current_app.name!r}. Press Ctrl-C to stop.", err=True)
    ctx.exit(0 if hub.run(timeout) else 1)
