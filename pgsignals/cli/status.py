"""``pgsignals status``: how the triggers stand, for people and for deploy checks."""

from __future__ import annotations

from dataclasses import asdict

import click

from pgsignals.inspection import read_queue_usage, read_states
from pgsignals.jsontext import to_json
from pgsignals.outbox.inspection import read_outbox
from pgsignals.outbox.schema import read_version
from pgsignals.runs import all_resolvers
from pgsignals.triggers.installer import MISSING, OUTDATED, STALE

from .options import (
    App,
    Watched,
    database_options,
    delivery_option,
    given_watchers,
    opened,
    watcher_options,
)
from .outbox import print_outbox
from .output import amount, examples, print_table


@click.command(
    epilog=examples(
        "pgsignals status",
        "pgsignals status orders users:updated",
        "pgsignals status --app shop.signals:WATCHERS --json",
    )
)
@watcher_options
@delivery_option
@database_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def status(
    ctx: click.Context,
    watched: tuple[Watched, ...],
    app: App,
    delivery: str,
    dsn: str,
    namespace: str,
    as_json: bool,
) -> None:
    """Tell how the triggers stand.

    INSTALLED: as a watcher needs it, or somebody listens. OUTDATED: not as it should be. MISSING:
    a watcher needs it. STALE: no watcher given needs it, and nobody listens. Without watchers it
    judges by the database alone.

    Where there is an outbox, it tells of that too: its size, its consumers and how far they are.

    Exit codes: 0 when nothing is MISSING or OUTDATED, otherwise 1; 2 a wrong command line.
    """
    watchers = given_watchers(watched, app, required=False)
    with opened(dsn) as cursor:
        durable = delivery == "outbox"
        states = read_states(cursor, watchers, all_resolvers(()), namespace, durable)
        usage = read_queue_usage(cursor)
        outbox = read_outbox(cursor) if read_version(cursor) else None
    ready = not any(state.status in (MISSING, OUTDATED) for state in states)
    if as_json:
        click.echo(
            to_json(
                {
                    "ok": ready,
                    "namespace": namespace,
                    "queue_usage": usage,
                    "watchers": [asdict(state) for state in states],
                    "outbox": None if outbox is None else asdict(outbox),
                }
            )
        )
    else:
        if states:
            print_table(
                ("STATUS", "TABLE", "OPERATION", "LABEL", "LISTENERS", "DETAIL"),
                [
                    (
                        state.status,
                        ".".join(filter(None, (state.schema, state.table))),
                        state.op,
                        state.label or "",
                        str(state.listeners),
                        state.detail,
                    )
                    for state in states
                ],
            )
        else:
            click.echo(f"Nothing is installed in namespace {namespace!r}.")
        if stale := sum(state.status == STALE for state in states):
            click.echo(
                f"{amount(stale, 'stale trigger')}: the next start of a Hub of this namespace "
                "removes what nobody listens to."
            )
        click.echo(f"The notification queue is {usage:.0%} full.")
        if outbox is not None:
            print_outbox(outbox)
    ctx.exit(0 if ready else 1)
