"""``pgsignals backfill``, ``pgsignals backfills``: existing rows as events, for a consumer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter

import click
from psycopg2.extensions import cursor as Cursor

from pgsignals.consumers.backfills import requests as administration
from pgsignals.consumers.backfills.requests import BackfillState
from pgsignals.core.json import to_json
from pgsignals.outbox.inspection import read_outbox
from pgsignals.triggers.resolvers.plain import PlainResolver
from pgsignals.triggers.table_lookup import describe, resolve

from .interrupt import interruptible
from .options import dsn_option, json_option
from .outbox import Answer, asking_outbox, opened_outbox, progress_text
from .output import amount, examples, notice, print_table

_POLL_SECONDS = 0.2
_LINE_SECONDS = 5.0
_INTERRUPTED = 130


@click.command(
    epilog=examples(
        "pgsignals backfill users --name mailer",
        "pgsignals backfill users --name mailer --where \"status = 'active'\"",
        "pgsignals backfill users --name mailer/kafka --no-wait",
    )
)
@click.argument("table")
@click.option("--name", required=True, help="The consumer: as start(name=…), or mailer/kafka.")
@click.option("--label", help="Deliver by the watcher with this label.")
@click.option("--where", metavar="SQL", help="Only rows that meet this condition.")
@click.option(
    "--chunk",
    metavar="N",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="Rows to read at a time, at most.",
)
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for its end.")
@dsn_option
@json_option
@click.pass_context
def backfill(
    ctx: click.Context,
    table: str,
    name: str,
    label: str | None,
    where: str | None,
    chunk: int,
    wait: bool,
    dsn: str,
    as_json: bool,
) -> None:
    """Have a consumer deliver the rows that TABLE has now, as snapshot events.

    The consumer's active process does it, and who takes over goes on with it, whether this command
    waits or not. It tells how far it is: as a bar on a terminal, otherwise as a line now and then.

    Exit codes: 0 done, or with --no-wait asked for; 1 failed, cancelled, or an error; 2 a wrong
    command line; 130 Ctrl-C, which ends the waiting and not the backfill.
    """
    with opened_outbox(dsn) as cursor, interruptible() as end:
        ref, _ = resolve(table, [PlainResolver()])
        found = describe(cursor, ref)
        administration.check_delivered(cursor, name, found.schema, found.name, label)
        number = administration.request(
            cursor, name, found.schema, found.name, label, condition=where, chunk=chunk
        )
        status = administration.backfill(cursor, number)
        notice(
            f"Backfill {number} of {status.target} for {name}: about {amount(status.total, 'row')}."
        )
        if wait:
            if not any(each.active for each in read_outbox(cursor).consumers if each.name == name):
                notice(f"No process reads for {name} now: it begins once one does.")
            remark = None
            with _progress(status) as tell:
                while status.state == "running" and end.wait(_POLL_SECONDS) is None:
                    status = administration.backfill(cursor, number)
                    tell(status)
                    if status.state == "running" and status.error not in (None, remark):
                        remark = status.error
                        notice(f"Backfill {number}: {remark}.")
    if as_json:
        click.echo(to_json(status))
    if not wait:
        return
    if status.state == "running":
        notice(f"Backfill {number} goes on: see `pgsignals backfills list`.")
        ctx.exit(_INTERRUPTED)
    seconds = (status.changed_at - status.started_at).total_seconds()
    notice(
        f"Backfill {number} {status.state}: {amount(status.done, 'row')} gone through, "
        f"{amount(status.delivered, 'event')}, {seconds:.1f} s."
    )
    if status.state != "done":
        if status.error is not None:
            raise click.ClickException(status.error)
        ctx.exit(1)


@contextmanager
def _progress(first: BackfillState) -> Iterator[Callable[[BackfillState], None]]:
    """Yield what tells a backfill's progress on stderr: a bar on a terminal, otherwise lines."""
    began = time.monotonic()

    def rate(status: BackfillState) -> int:
        return round((status.done - first.done) / max(time.monotonic() - began, 1e-3))

    if not sys.stderr.isatty():
        told_at = began

        def tell(status: BackfillState) -> None:
            nonlocal told_at
            now = time.monotonic()
            if status.state == "running" and now - told_at >= _LINE_SECONDS:
                told_at = now
                speed = rate(status)
                left = f", {(status.total - status.done) / speed:.0f} s left" if speed else ""
                notice(f"{progress_text(status)}, {speed:,} rows/s{left}")

        yield tell
        return

    def shown(speed: int | None) -> str | None:
        return None if speed is None else f"{speed:,} rows/s"

    with click.progressbar(
        length=max(1, first.total), file=sys.stderr, show_percent=True, item_show_func=shown
    ) as bar:

        def advance(status: BackfillState) -> None:
            # The estimate of the total gets better by and by.
            bar.length = max(1, status.total)
            done = 1 if status.state == "done" and not status.total else status.done
            bar.update(done - bar.pos, rate(status))

        yield advance


@click.group(epilog=examples("pgsignals backfills list", "pgsignals backfills cancel 3"))
def backfills() -> None:
    """The backfills that were asked for.

    Exit codes: 0 well; 1 an error; 2 a wrong command line.
    """


@backfills.command("list", epilog=examples("pgsignals backfills list --json"))
@asking_outbox
def list_backfills(cursor: Cursor) -> Answer:
    """List them, the latest last; those that ended days ago are forgotten."""
    found = administration.backfills(cursor)
    values_of = attrgetter(
        "id", "consumer", "target", "state", "done", "total", "delivered", "condition", "error"
    )
    table = partial(
        print_table,
        ("ID", "CONSUMER", "OF", "STATE", "DONE", "TOTAL", "EVENTS", "WHERE", "ERROR"),
        [values_of(each) for each in found],
        "There are no backfills.",
    )
    return Answer({"backfills": found}, table)


@backfills.command("cancel", epilog=examples("pgsignals backfills cancel 3"))
@click.argument("id", type=int)
@asking_outbox
def cancel_backfill(cursor: Cursor, id: int) -> Answer:  # noqa: A002
    """End one. What is with receivers is still delivered."""
    cancelled = administration.cancel(cursor, id)
    text = f"Cancelled backfill {id}." if cancelled else f"Backfill {id} had ended."
    return Answer({"backfill": id, "cancelled": cancelled}, text)
