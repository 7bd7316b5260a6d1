"""``pgsignals install`` and ``uninstall``: triggers ahead of the applications that need them."""

from __future__ import annotations

from collections.abc import Sequence

import click

from pgsignals.core.transport import Transport
from pgsignals.outbox import removal
from pgsignals.outbox.schema import install_schema
from pgsignals.postgres.connection import opened
from pgsignals.triggers import installer
from pgsignals.triggers.catalogue import Installed
from pgsignals.wal.publication import ensure_publications

from .options import Scope, database_options, json_option, scope_options
from .output import amount, emit, examples, notice


@click.command(
    epilog=examples(
        "pgsignals install orders users:updated",
        "pgsignals install --app shop.signals:WATCHERS --dsn postgresql://owner@localhost/shop",
        "pgsignals install orders --delivery outbox",
        "pgsignals install orders --delivery wal",
    )
)
@scope_options
@click.option(
    "--prune",
    "pruning",
    is_flag=True,
    help="Also remove triggers of the namespace that none of these watchers needs, unless somebody "
    "listens to them or a consumer reads what they write.",
)
@json_option
def install(scope: Scope, pruning: bool, as_json: bool) -> None:
    """Install the triggers that watchers need, and for durable delivery its schema.

    In WAL delivery the tables that are served by rows get no trigger: they are put into the
    publications pgsignals and pgsignals_inserts, and a function that nothing calls marks them.

    It runs no DDL when nothing is missing or outdated. Run it as the owner of the tables; the
    application can then start with install="check" and needs no right to create anything.

    Exit codes: 0 well, also when nothing was to be done; 1 an error; 2 a wrong command line.
    """
    watchers = scope.watchers()
    with opened(scope.dsn) as cursor:
        if scope.delivery.durable:
            install_schema(cursor)
        if scope.delivery is Transport.WAL:
            ensure_publications(cursor)
        triggers = [each.trigger for each in scope.define(cursor, watchers)]
        created = installer.install(cursor, scope.namespace, triggers)
        removed = installer.prune(cursor, scope.namespace, triggers) if pruning else []
    unchanged = len({each.name for each in triggers}) - len(created)
    specs = [each.spec for each in created]
    answer = {
        "namespace": scope.namespace,
        "installed": [
            {"schema": spec.table.schema, "table": spec.table.name, "op": spec.op} for spec in specs
        ],
        "unchanged": unchanged,
        "removed": _listed(removed),
    }
    lines = [
        *(f"installed {spec.op} on {spec.table.qualified}" for spec in specs),
        *_lines(removed),
        f"{amount(len(created), 'trigger')} installed, {unchanged} already there.",
    ]
    emit(as_json, answer, "\n".join(lines))


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
    help="Remove durable delivery in place of the namespace: the schema pgsignals with the outbox, "
    "all consumers, their dead letters and slots, and the triggers of every namespace that are for "
    "it.",
)
@click.option("--yes", is_flag=True, help="With --schema: do not ask.")
@database_options
@json_option
def uninstall(
    force: bool, whole_schema: bool, yes: bool, dsn: str, namespace: str, as_json: bool
) -> None:
    """Remove all triggers of the namespace, or durable delivery.

    Nothing else is touched: not other namespaces, nor triggers that pgsignals did not create. In
    WAL delivery tables leave the publications that nobody needs there any more, and the last one
    takes the publications along, unless a slot is there to read through them.
    --schema asks first, and refuses while a process reads for a consumer.

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
    count = f"{amount(len(removed), 'trigger')} removed from namespace {namespace!r}."
    answer = {"namespace": namespace, "removed": _listed(removed)}
    emit(as_json, answer, "\n".join([*_lines(removed), count]))


def _uninstall_schema(dsn: str, yes: bool, as_json: bool) -> None:
    with opened(dsn) as cursor:
        found = removal.survey(cursor)
        if not yes:
            notice(
                f"The schema pgsignals of {cursor.connection.info.dbname!r} has "
                f"{_contents(found)}; {amount(len(found.triggers), 'trigger')} that write to it."
            )
            click.confirm("Remove all that?", abort=True, err=True)
        removed = removal.remove(cursor)
    text = f"{amount(len(removed), 'trigger')} and the schema pgsignals removed."
    emit(as_json, {"schema": "pgsignals", "removed": _listed(removed)}, text)


def _listed(removed: Sequence[Installed]) -> list[dict[str, str | None]]:
    return [{"schema": i.schema, "table": i.table, "op": i.tag.op} for i in removed]


def _lines(removed: Sequence[Installed]) -> list[str]:
    return [
        f"removed {item.tag.op} on {'.'.join(filter(None, (item.schema, item.table)))}"
        for item in removed
    ]


def _contents(found: removal.Survey) -> str:
    if found.consumers is None or found.dead_letters is None:
        return "a version that this pgsignals cannot count the consumers of"
    lags = "".join(f", {name!r} with {lag:,} events unread" for name, lag in found.consumers)
    return (
        f"{amount(len(found.consumers), 'consumer')}{lags};"
        f" {amount(found.dead_letters, 'dead letter')}"
    )
