"""``pgsignals plugins``: the plugins that are installed."""

from __future__ import annotations

from functools import partial

import click

from pgsignals.plugins.loader import load_plugins

from .options import json_option
from .output import emit, examples, print_table


@click.command(epilog=examples("pgsignals plugins", "pgsignals plugins --json"))
@json_option
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """List the installed plugins, their hooks, and why one cannot be used.

    Exit codes: 0 when all can be used, otherwise 1; 2 a wrong command line.
    """
    found = load_plugins().states()
    table = partial(
        print_table,
        ("PLUGIN", "PACKAGE", "VERSION", "HOOKS", "ERROR"),
        [(p.name, p.distribution, p.version, ", ".join(p.hooks), p.error) for p in found],
        "No plugins are installed.",
    )
    emit(as_json, {"plugins": found}, table)
    ctx.exit(1 if any(each.error for each in found) else 0)
