"""``pgsignals install`` and ``uninstall``: triggers ahead of the applications that need them."""

from __future__ import annotations

import click

from pgsignals.runs import all_resolvers
from pgsignals.triggers import installer
from pgsignals.triggers.definitions import define

from .options import (
    App,
    Watched,
    database_options,
    given_watchers,
    opened,
    watcher_options,
)
from .output import amount


@click.command()
@watcher_options
@database_options
def install(watched: tuple[Watched, ...], app: App, dsn: str, namespace: str) -> None:
    """Install the triggers that watchers need.

    It runs no DDL when nothing is missing or outdated. Run it as the owner of the tables; the
    application can then start with install="check" and needs no right to create anything.
    """
    watchers = given_watchers(watched, app)
    with opened(dsn) as cursor:
        definitions = define(cursor, watchers, all_resolvers(()), namespace)
        created = installer.install(cursor, namespace, [each.trigger for each in definitions])
    for trigger in created:
        click.echo(f"installed {trigger.spec.op} on {trigger.spec.table.qualified}")
    unchanged = len({each.trigger.name for each in definitions}) - len(created)
    click.echo(f"{amount(len(created), 'trigger')} installed, {unchanged} already there.")


@click.command()
@click.option("--force", is_flag=True, help="Even while somebody listens, who is then deaf.")
@database_options
def uninstall(force: bool, dsn: str, namespace: str) -> None:
    """Remove all triggers of the namespace.

    Nothing else is touched: not other namespaces, nor triggers that pgsignals did not create.
    """
    with opened(dsn) as cursor:
        removed = installer.uninstall(cursor, namespace, force=force)
    for item in removed:
        where = item.schema if item.table is None else f"{item.schema}.{item.table}"
        click.echo(f"removed {item.tag.op} on {where}")
    click.echo(f"{amount(len(removed), 'trigger')} removed from namespace {namespace!r}.")
