"""``pgsignals install`` and ``uninstall``: triggers ahead of the applications that need them."""

from __future__ import annotations

import click

from pgsignals.jsontext import to_json
from pgsignals.outbox import removal
from pgsignals.outbox.schema import install_schema
from pgsignals.runs import all_resolvers
from pgsignals.triggers import installer
from pgsignals.triggers.definitions import define

from .options import (
    App,
    Watched,
    database_options,
    delivery_option,
    given_watchers,
    opened,
    watcher_options,
)
from .output import amount, examples, notice


@click.command(
    epilog=examples(
        "pgsignals install orders users:updated",
        "pgsignals install --app shop.signals:WATCHERS --dsn postgresql://owner@localhost/shop",
        "pgsignals install orders --delivery outbox",
    )
)
@watcher_options
@delivery_option
@database_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def install(
    watched: tuple[Watched, ...],
    app: App,
    delivery: str,
    dsn: str,
    namespace: str,
    as_json: bool,
) -> None:
    """Install the triggers that watchers need, and for outbox delivery its schema.

    It runs no DDL when nothing is missing or outdated. Run it as the owner of the tables; the
    application can then start with install="check" and needs no right to create anything.

    Exit codes: 0 well, also when nothing was to be done; 1 an error; 2 a wrong command line.
    """
    watchers = given_watchers(watched, app)
    with opened(dsn) as cursor:
        durable = delivery == "outbox"
        if durable:
            install_schema(cursor)
        definitions = define(cursor, watchers, all_resolvers(()), namespace, durable)
        triggers = [each.trigger for each in definitions]
        created = installer.install(cursor, namespace, triggers)
    unchanged = len({each.trigger.name for each in definitions}) - len(created)
    if as_json:
        installed = [
            {"schema": t.spec.table.schema, "table": t.spec.table.name, "op": t.spec.op}
            for t in created
        ]
        answer = {"namespace": namespace, "installed": installed, "unchanged": unchanged}
        click.echo(to_json(answer))
        return
    for trigger in created:
        click.echo(f"installed {trigger.spec.op} on {trigger.spec.table.qualified}")
    click.echo(f"{amount(len(created), 'trigger')} installed, {unchanged} already there.")


@click.command(
    epilog=examples(
        "pgsignals uninstall",
        "pgsignals uninstall --namespace reports --force",
        "pgsignals uninstall --schema --yes",
    )
)
@click.option("--force", is_flag=True, help="Even while somebody listens, who is then deaf.")
@click.option(
    "--schema",
    "whole_schema",
    is_flag=True,
    help="Remove the outbox in place of the namespace: the schema pgsignals with all consumers and "
    "dead letters, and the triggers of every namespace that write to it.",
)
@click.option("--yes", is_flag=True, help="With --schema: do not ask.")
@database_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def uninstall(
    force: bool, whole_schema: bool, yes: bool, dsn: str, namespace: str, as_json: bool
) -> None:
    """Remove all triggers of the namespace, or the outbox.

    Nothing else is touched: not other namespaces, nor triggers that pgsignals did not create.
    --schema asks first, and refuses while a process reads the outbox.

    Exit codes: 0 well, also when there were none; 1 an error, somebody listens, or the answer was
    no; 2 a wrong command line.
    """
    if whole_schema:
        if force:
            raise click.UsageError("--force does not go with --schema: stop its consumers first.")
        _uninstall_schema(dsn, yes, as_json)
        return
    if yes:
        raise click.UsageError("--yes answers what --schema asks, and nothing else asks.")
    with opened(dsn) as cursor:
        removed = installer.uninstall(cursor, namespace, force=force)
    if as_json:
        gone = [{"schema": i.schema, "table": i.table, "op": i.tag.op} for i in removed]
        click.echo(to_json({"namespace": namespace, "removed": gone}))
        return
    for item in removed:
        where = item.schema if item.table is None else f"{item.schema}.{item.table}"
        click.echo(f"removed {item.tag.op} on {where}")
    click.echo(f"{amount(len(removed), 'trigger')} removed from namespace {namespace!r}.")


def _uninstall_schema(dsn: str, yes: bool, as_json: bool) -> None:
    with opened(dsn) as cursor:
        found = removal.survey(cursor)
        if not yes:
            notice(
                f"The schema pgsignals of {cursor.connection.info.dbname!r} has "
                f"{amount(len(found.consumers), 'consumer')}"
                + "".join(f", {name!r} with {lag:,} events unread" for name, lag in found.consumers)
                + f"; {amount(found.dead_letters, 'dead letter')}; "
                f"{amount(len(found.triggers), 'trigger')} that write to it."
            )
            click.confirm("Remove all that?", abort=True, err=True)
        removed = removal.remove(cursor)
    if as_json:
        gone = [{"schema": i.schema, "table": i.table, "op": i.tag.op} for i in removed]
        click.echo(to_json({"schema": "pgsignals", "removed": gone}))
        return
    click.echo(f"{amount(len(removed), 'trigger')} and the schema pgsignals removed.")
