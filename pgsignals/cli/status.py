"""``pgsignals status``: the state of the triggers, for people and for deploy checks."""

from __future__ import annotations

from collections.abc import Sequence

import click

from pgsignals.hub.options import all_resolvers
from pgsignals.outbox.inspection import read_outbox
from pgsignals.outbox.schema import read_version
from pgsignals.postgres.connection import opened
from pgsignals.postgres.notification_queue import read_queue_usage
from pgsignals.triggers.inspection import read_states
from pgsignals.triggers.installer import MISSING, OUTDATED, STALE, State

from .options import Scope, json_option, scope_options
from .outbox import print_outbox
from .output import amount, emit, examples, print_table


@click.command(
    epilog=examples(
        "pgsignals status",
        "pgsignals status orders users:updated",
        "pgsignals status --app shop.signals:WATCHERS --json",
    )
)
@scope_options
@json_option
@click.pass_context
def status(ctx: click.Context, scope: Scope, as_json: bool) -> None:
    """Tell how the triggers stand.

    INSTALLED: as a watcher needs it, or somebody listens. OUTDATED: not as it should be. MISSING:
    a watcher needs it. STALE: no watcher given needs it, and nobody listens. Without watchers it
    judges by the database alone.

    In WAL delivery it tells whether rows of the log serve a watcher, or messages of a trigger and
    why.

    Where there is durable delivery, it tells of that too: the outbox's size, the consumers and how
    far they are.

    Exit codes: 0 when nothing is MISSING or OUTDATED, otherwise 1; 2 a wrong command line.
    """
    watchers = scope.watchers(required=False)
    with opened(scope.dsn) as cursor:
        states = read_states(
            cursor, watchers, all_resolvers(()), scope.namespace, scope.delivery, scope.capture
        )
        usage = read_queue_usage(cursor)
        outbox = read_outbox(cursor) if read_version(cursor) else None
    ready = not any(state.status in (MISSING, OUTDATED) for state in states)
    answer = {
        "ok": ready,
        "namespace": scope.namespace,
        "queue_usage": usage,
        "watchers": states,
        "outbox": outbox,
    }

    def tell() -> None:
        _print_states(states, scope.namespace)
        click.echo(f"The notification queue is {usage:.0%} full.")
        if outbox is not None:
            print_outbox(outbox)

    emit(as_json, answer, tell)
    ctx.exit(0 if ready else 1)


def _print_states(states: Sequence[State], namespace: str) -> None:
    logged = any(state.served for state in states)
    print_table(
        (
            *("STATUS", "TABLE", "OPERATION", "LABEL", "LISTENERS"),
            *(["SERVED BY"] if logged else []),
            "DETAIL",
        ),
        [
            (
                state.status,
                ".".join(filter(None, (state.schema, state.table))),
                state.op,
                state.label,
                state.listeners,
                *([state.served] if logged else []),
                "; ".join(filter(None, (state.detail, state.lacking))),
            )
            for state in states
        ],
        f"Nothing is installed in namespace {namespace!r}.",
    )
    if stale := sum(state.status == STALE for state in states):
        click.echo(
            f"{amount(stale, 'stale trigger')}: the next start of a Hub of this namespace, or "
            "`pgsignals install --prune`, removes what nobody listens to."
        )
