"""``pgsignals plugins``: what is installed."""

from __future__ import annotations

from dataclasses import asdict

import click

from pgsignals.jsontext import to_json
from pgsignals.plugins import load_plugins

from .output import examples, print_table


@click.command(epilog=examples("pgsignals plugins", "pgsignals plugins --json"))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """List the installed plugins, their hooks, and why one cannot be used.

    Exit codes: 0 when all can be used, otherwise 1; 2 a wrong command line.
    """
    found = load_plugins().states()
    if as_json:
        click.echo(to_json({"plugins": [asdict(each) for each in found]}))
    elif found:
        print_table(
            ("PLUGIN", "PACKAGE", "VERSION", "HOOKS", "ERROR"),
            [(p.name, p.distribution, p.version, ", ".join(p.hooks), p.error) for p in found],
        )
    else:
        click.echo("No plugins are installed.")
    ctx.exit(1 if any(each.error for each in found) else 0)
