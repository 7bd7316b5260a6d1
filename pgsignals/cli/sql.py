"""``pgsignals sql``: what install would run, for a migration or for a DBA."""

from __future__ import annotations

from collections.abc import Iterable

import click

from pgsignals.core.transport import Transport
from pgsignals.outbox.schema import read_version, upgrade_statements
from pgsignals.postgres.connection import opened
from pgsignals.triggers.catalogue import read_installed
from pgsignals.triggers.installer import plan
from pgsignals.triggers.names import INSTALL_LOCKING
from pgsignals.triggers.publications import tidying
from pgsignals.triggers.sql import drop_statement
from pgsignals.wal.publication import missing_publications

from .options import Scope, scope_options
from .output import examples


@click.command(
    epilog=examples(
        "pgsignals sql orders > migration.sql",
        "pgsignals sql --app shop.signals:WATCHERS --all",
        "pgsignals sql --uninstall orders",
        "pgsignals sql orders --delivery outbox",
        "pgsignals sql orders --delivery wal",
    )
)
@scope_options
@click.option("--all", "everything", is_flag=True, help="Also what this database already has.")
@click.option(
    "--uninstall",
    "removing",
    is_flag=True,
    help="Print what removes the triggers of these watchers; without watchers, all that the "
    "namespace has in this database.",
)
def sql(scope: Scope, everything: bool, removing: bool) -> None:
    """Print the SQL that install would run.

    It is one transaction, for `psql -v ON_ERROR_STOP=1 -f` or a migration. The database is read
    for its tables' columns and for what it already has.

    Exit codes: 0 well, also when there is nothing to do; 1 an error; 2 a wrong command line.
    """
    watchers = scope.watchers(required=not removing)
    with opened(scope.dsn) as cursor:
        triggers = [each.trigger for each in scope.define(cursor, watchers)]
        installed = read_installed(cursor, scope.namespace)
        statements: list[str] = []
        if removing:
            if triggers:
                statements += [each for trigger in triggers for each in trigger.drop]
                logged = scope.delivery is Transport.WAL
            else:
                for item in installed:
                    statements.append(drop_statement(item.function_schema, item.name))
                logged = any(item.transport is Transport.WAL for item in installed)
            if logged:
                statements += [INSTALL_LOCKING, tidying(whole=True)]
        else:
            if scope.delivery is Transport.WAL:
                statements += missing_publications(cursor, everything=everything)
            if scope.delivery.durable:
                version = 0 if everything else read_version(cursor)
                statements += upgrade_statements(version)
            needed = plan(triggers, [] if everything else installed).statements
            if scope.delivery is Transport.WAL and needed:
                statements.append(INSTALL_LOCKING)
            statements += needed
    if statements:
        click.echo(script(statements))
    else:
        click.echo("-- Nothing to do: the database is as it should be.")


def script(statements: Iterable[str]) -> str:
    """Return a transaction that psql runs as it stands, whatever encoding the terminal has.

    It waits for a table in use as briefly as install does, since the table's writers queue.
    """
    head = (
        "SET client_encoding = 'UTF8'",
        "BEGIN",
        "SET LOCAL standard_conforming_strings = on",
        "SET LOCAL lock_timeout = '500ms'",
    )
    return "\n".join(f"{statement};" for statement in (*head, *statements, "COMMIT"))
