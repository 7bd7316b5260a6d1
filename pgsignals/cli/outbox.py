"""``pgsignals consumers`` and ``dead-letters``: what an operator does about outbox delivery."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import click
from psycopg2.extensions import cursor as Cursor

from pgsignals.errors import DatabaseError
from pgsignals.jsontext import to_json
from pgsignals.outbox import administration
from pgsignals.outbox.backfill import BackfillState
from pgsignals.outbox.inspection import OutboxState, read_outbox
from pgsignals.outbox.schema import read_version

from .options import opened
from .output import amount, examples, print_table

dsn_option = click.option(
    "--dsn",
    default="",
    envvar="PGSIGNALS_DSN",
    show_envvar=True,
    help="A connection string; what it leaves out comes from libpq's PG… variables.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def print_outbox(outbox: OutboxState) -> None:
    """The outbox and its consumers, for people."""
    click.echo(
        f"The outbox has {outbox.bytes / 2**20:.1f} MiB in {amount(outbox.partitions, 'partition')}"
        f" and {amount(len(outbox.consumers), 'consumer')}."
    )
    if outbox.consumers:
        print_table(
            (
                "CONSUMER",
                "PART",
                "STATE",
                "LAG",
                "SECONDS",
                "OLDEST",
                "EVENT",
                "ACKNOWLEDGED",
                "DEAD LETTERS",
            ),
            [
                (
                    each.name,
                    f"{each.part + 1}/{each.parts}",
                    "active" if each.active else "nobody reads",
                    str(each.lag),
                    f"{each.lag_seconds:.1f}",
                    "" if each.oldest_at is None else f"{each.oldest_at:%Y-%m-%d %H:%M:%S%z}",
                    each.oldest or "",
                    str(each.acknowledged),
                    str(each.dead_letters),
                )
                for each in outbox.consumers
            ],
        )
    for each in outbox.consumers:
        if each.lost_until is not None:
            click.echo(
                f"{each.name} will get a Gap: events of before {each.lost_until} were dropped."
            )
    for backfill in outbox.backfills:
        click.echo(
            f"Backfill {backfill.id} of {backfill.target} for {backfill.consumer}: "
            f"{progress_text(backfill)}."
        )


def progress_text(status: BackfillState) -> str:
    """``1,200 of about 5,000 rows (24%)``."""
    share = status.done / status.total if status.total else 1.0
    return f"{status.done:,} of about {amount(status.total, 'row')} ({share:.0%})"


def require_outbox(cursor: Cursor) -> None:
    """Raise DatabaseError when the database has no outbox."""
    if not read_version(cursor):
        raise DatabaseError(
            "There is no outbox in this database: no schema 'pgsignals'. Give the database "
            "with --dsn, or run `pgsignals install --delivery outbox` first."
        )


def _run(dsn: str, act: Callable[[Cursor], Any]) -> Any:
    with opened(dsn) as cursor:
        require_outbox(cursor)
        return act(cursor)


@click.group(
    epilog=examples("pgsignals consumers list", "pgsignals consumers reset mailer --to now")
)
def consumers() -> None:
    """The consumers of the outbox: who reads, how far, from where.

    Exit codes: 0 well; 1 an error; 2 a wrong command line.
    """


@consumers.command("list", epilog=examples("pgsignals consumers list --json"))
@dsn_option
@json_option
def list_consumers(dsn: str, as_json: bool) -> None:
    """List the consumers, and how far each is behind."""
    outbox: OutboxState = _run(dsn, read_outbox)
    if as_json:
        click.echo(to_json({"consumers": [asdict(each) for each in outbox.consumers]}))
    else:
        print_outbox(outbox)


@consumers.command("drop", epilog=examples("pgsignals consumers drop mailer"))
@click.argument("name")
@dsn_option
@json_option
def drop_consumer(name: str, dsn: str, as_json: bool) -> None:
    """Forget a consumer, so that the outbox keeps nothing for it any more.

    One that a process reads for is left alone: stop that first.
    """
    dead = _run(dsn, lambda cursor: administration.drop_consumer(cursor, name))
    if as_json:
        click.echo(to_json({"dropped": name, "dead_letters": dead}))
    else:
        click.echo(f"Forgot the consumer {name!r} and {amount(dead, 'dead letter')} of it.")


def _target(ctx: click.Context, param: click.Parameter, value: str) -> str | datetime:
    if value in ("now", "earliest"):
        return value
    try:
        # Python 3.10 does not know the Z.
        found = datetime.fromisoformat(re.sub(r"[Zz]\Z", "+00:00", value))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither 'now' nor 'earliest' nor a time such as "
            "'2026-03-31 14:00+02:00' or, in UTC, '2026-03-31T12:00'."
        ) from None
    return found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)


@consumers.command(
    "reset",
    epilog=examples(
        "pgsignals consumers reset mailer --to earliest",
        "pgsignals consumers reset mailer --to '2026-03-31 14:00+02:00'",
    ),
)
@click.argument("name")
@click.option(
    "--to",
    "target",
    required=True,
    metavar="now|earliest|TIME",
    callback=_target,
    help="now: skip what is there. earliest: deliver again all that the outbox still holds. TIME: "
    "deliver again what happened from then on; in ISO 8601, and in UTC unless it has a zone.",
)
@dsn_option
@json_option
def reset_consumer(name: str, target: str | datetime, dsn: str, as_json: bool) -> None:
    """Have a consumer go on from somewhere else.

    One that a process reads for is left alone: stop that first. Where the outbox does not go back
    to TIME, the consumer gets a Gap.
    """
    lost_until = _run(dsn, lambda cursor: administration.reset_consumer(cursor, name, target))
    if as_json:
        click.echo(to_json({"reset": name, "to": str(target), "lost_until": lost_until}))
    else:
        click.echo(f"The consumer {name!r} goes on from {target}.")
    if lost_until is not None:
        click.echo(
            f"The outbox has nothing from before {lost_until} any more: the consumer will get a "
            "Gap up to then.",
            err=True,
        )


@click.group(
    "dead-letters",
    epilog=examples("pgsignals dead-letters list", "pgsignals dead-letters retry --all"),
)
def dead_letters() -> None:
    """Events that a receiver could not take, and that were kept.

    Exit codes: 0 well; 1 an error; 2 a wrong command line.
    """


@dead_letters.command("list", epilog=examples("pgsignals dead-letters list --json"))
@dsn_option
@json_option
def list_letters(dsn: str, as_json: bool) -> None:
    """List them, the latest last."""
    found = _run(dsn, administration.dead_letters)
    if as_json:
        click.echo(to_json({"dead_letters": [asdict(each) for each in found]}))
    elif found:
        print_table(
            ("ID", "CONSUMER", "RECEIVER", "EVENT", "TRIES", "ERROR"),
            [(str(e.id), e.consumer, e.receiver, e.uid, str(e.attempts), e.error) for e in found],
        )
    else:
        click.echo("There are no dead letters.")


@dead_letters.command("show", epilog=examples("pgsignals dead-letters show 1"))
@click.argument("id", type=int)
@dsn_option
@json_option
def show_letter(id: int, dsn: str, as_json: bool) -> None:  # noqa: A002
    """Show one, with its message and the traceback."""
    found = _run(dsn, lambda cursor: administration.dead_letter(cursor, id))
    if as_json:
        click.echo(to_json(asdict(found)))
        return
    click.echo(f"{found.uid} for {found.receiver} of {found.consumer}, {found.at}")
    click.echo(f"row {found.number} of the message:")
    click.echo(found.payload)
    click.echo(found.traceback)


def _chosen(ids: tuple[int, ...], everything: bool) -> list[int] | None:
    if bool(ids) == everything:
        raise click.UsageError("Give the ids of dead letters, or --all.")
    return None if everything else list(ids)


@dead_letters.command("retry", epilog=examples("pgsignals dead-letters retry 1 2"))
@click.argument("ids", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that there are.")
@dsn_option
@json_option
def retry_letters(ids: tuple[int, ...], everything: bool, dsn: str, as_json: bool) -> None:
    """Have them delivered again, each to the receiver that could not take it.

    The active process of the consumer does it, at once, or as soon as there is one. What its
    receiver takes is a dead letter no more.
    """
    chosen = _chosen(ids, everything)
    count = _run(dsn, lambda cursor: administration.retry(cursor, chosen))
    if as_json:
        click.echo(to_json({"retried": count}))
    else:
        click.echo(f"{amount(count, 'dead letter')} will be delivered again.")


@dead_letters.command("drop", epilog=examples("pgsignals dead-letters drop --all"))
@click.argument("ids", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that there are.")
@dsn_option
@json_option
def drop_letters(ids: tuple[int, ...], everything: bool, dsn: str, as_json: bool) -> None:
    """Forget them."""
    chosen = _chosen(ids, everything)
    count = _run(dsn, lambda cursor: administration.drop_letters(cursor, chosen))
    if as_json:
        click.echo(to_json({"dropped": count}))
    else:
        click.echo(f"{amount(count, 'dead letter')} dropped.")
