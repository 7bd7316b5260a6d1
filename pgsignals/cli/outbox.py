"""``pgsignals consumers`` and ``dead-letters``: what an operator does about durable delivery."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial, wraps
from typing import Any, NamedTuple

import click
from psycopg2.extensions import cursor as Cursor

from pgsignals.consumers import dead_letters as letters
from pgsignals.consumers.backfills.requests import BackfillState
from pgsignals.consumers.slot_states import SlotState, dropping
from pgsignals.core.errors import DatabaseError
from pgsignals.core.events import read_time
from pgsignals.outbox import administration
from pgsignals.outbox.inspection import OutboxState, read_outbox
from pgsignals.outbox.schema import read_version
from pgsignals.postgres.connection import opened

from .options import dsn_option, json_option
from .output import amount, emit, examples, notice, print_table, printable
from .units import size_text, time_text

Command = Callable[..., object]


class Answer(NamedTuple):
    """The answer of a command: for JSON, for people as ``emit`` takes it, and on stderr."""

    data: object
    tell: str | Callable[[], object]
    notices: Sequence[str] = ()


def print_outbox(outbox: OutboxState) -> None:
    """Print the outbox and its consumers, for people."""
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
                    each.lag if each.unread_bytes is None else size_text(each.unread_bytes),
                    f"{each.lag_seconds:.1f}",
                    each.oldest_at and f"{each.oldest_at:%Y-%m-%d %H:%M:%S%z}",
                    each.oldest,
                    each.acknowledged,
                    each.dead_letters,
                )
                for each in outbox.consumers
            ],
        )
    for each in outbox.consumers:
        if each.unread_bytes is not None and not each.ephemeral:
            click.echo(f"{each.name} reads the write-ahead log{slot_text(each.slot)}.")
        if each.lost_until is not None:
            click.echo(f"{each.name} will get a Gap: events of before {each.lost_until} are lost.")
    for parked in outbox.parked:
        click.echo(
            f"{parked.consumer}: {amount(parked.events, 'event')} kept for the receiver "
            f"{parked.receiver}, which is slow, the oldest since "
            f"{parked.since:%Y-%m-%d %H:%M:%S%z}; the others have gone on."
        )
    for backfill in outbox.backfills:
        click.echo(
            f"Backfill {backfill.id} of {backfill.target} for {backfill.consumer}: "
            f"{progress_text(backfill)}."
        )


def slot_text(slot: SlotState | None) -> str:
    """Return a text such as ``by the slot …, for which the server keeps 16 MiB …``."""
    if slot is None:
        return ", and its replication slot is gone, so that it will get a Gap"
    text = f" by the replication slot {slot.name}"
    if slot.invalidation:
        return f"{text}, which the server has given up ({slot.invalidation}): it will get a Gap"
    if slot.begins is None:
        return f"{text}, which is being made, and waits for transactions that are writing"
    text += f", for which the server keeps {size_text(slot.retained_bytes)}"
    bounds = []
    if slot.safe_bytes is not None:
        bounds.append(f"after {size_text(max(0, slot.safe_bytes))} more")
    if slot.safe_seconds is not None:
        bounds.append(f"in {time_text(max(0.0, slot.safe_seconds))} if nobody reads from it")
    return f"{text} and gives it up {' or '.join(bounds)}" if bounds else f"{text}, without a bound"


def progress_text(status: BackfillState) -> str:
    """Return a text such as ``1,200 of about 5,000 rows (24%)``."""
    share = status.done / status.total if status.total else 1.0
    return f"{status.done:,} of about {amount(status.total, 'row')} ({share:.0%})"


@contextmanager
def opened_outbox(dsn: str) -> Iterator[Cursor]:
    """Yield a cursor of a new connection. Raises DatabaseError if the database has no outbox."""
    with opened(dsn) as cursor:
        if not read_version(cursor):
            raise DatabaseError(
                "There is no outbox in this database: no schema 'pgsignals'. Give the database "
                "with --dsn, or run `pgsignals install --delivery outbox` (or wal) first."
            )
        yield cursor


def asking_outbox(function: Callable[..., Answer]) -> Command:
    """Make a command, with ``--dsn`` and ``--json``, of a function of a cursor."""

    @dsn_option
    @json_option
    @wraps(function)
    def call(dsn: str, as_json: bool, **given: Any) -> None:
        with opened_outbox(dsn) as cursor:
            answer = function(cursor, **given)
        emit(as_json, answer.data, answer.tell)
        for text in answer.notices:
            notice(text)

    return call


@click.group(
    epilog=examples("pgsignals consumers list", "pgsignals consumers reset mailer --to now")
)
def consumers() -> None:
    """The consumers of durable delivery: who reads, how far, from where.

    Exit codes: 0 well; 1 an error; 2 a wrong command line.
    """


@consumers.command("list", epilog=examples("pgsignals consumers list --json"))
@asking_outbox
def list_consumers(cursor: Cursor) -> Answer:
    """List the consumers, and how far each is behind.

    The lag is in events of the outbox; in WAL delivery it is how much of the log is unread, most of
    which may be of no concern to the consumer.
    """
    outbox = read_outbox(cursor)
    answer = {"consumers": outbox.consumers, "parked": outbox.parked, "streams": outbox.streams}
    streams = outbox.streams
    if streams is None:
        return Answer(answer, partial(print_outbox, outbox))
    note = (
        f"For streams to browsers the server keeps {size_text(streams.retained_bytes)} of its log, "
        f"by the slot {streams.name}; where there are no streams any more: "
        f"{dropping(streams.name)};"
    )
    return Answer(answer, partial(print_outbox, outbox), [note])


@consumers.command("drop", epilog=examples("pgsignals consumers drop mailer"))
@click.argument("name")
@asking_outbox
def drop_consumer(cursor: Cursor, name: str) -> Answer:
    """Forget a consumer, so that nothing is kept for it any more; its replication slot goes, too.

    One that a process reads for is left alone: stop that first.
    """
    dead = administration.drop_consumer(cursor, name)
    text = f"Forgot the consumer {name!r} and {amount(dead, 'dead letter')} of it."
    return Answer({"dropped": name, "dead_letters": dead}, text)


def _target(ctx: click.Context, param: click.Parameter, value: str) -> str | datetime:
    if value in ("now", "earliest"):
        return value
    try:
        return read_time(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither 'now' nor 'earliest' nor a time such as "
            "'2026-03-31 14:00+02:00' or, in UTC, '2026-03-31T12:00'."
        ) from None


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
@asking_outbox
def reset_consumer(cursor: Cursor, name: str, target: str | datetime) -> Answer:
    """Have a consumer go on from somewhere else.

    One that a process reads for is left alone: stop that first. Where the outbox does not go back
    to TIME, the consumer gets a Gap. A consumer of the write-ahead log can only go on from now.
    """
    lost_until = administration.reset_consumer(cursor, name, target)
    answer = {"reset": name, "to": str(target), "lost_until": lost_until}
    text = f"The consumer {name!r} goes on from {target}."
    if lost_until is None:
        return Answer(answer, text)
    gap = (
        f"The outbox has nothing from before {lost_until} any more: the consumer will get a Gap up "
        "to then."
    )
    return Answer(answer, text, [gap])


@click.group(
    "dead-letters",
    epilog=examples("pgsignals dead-letters list", "pgsignals dead-letters retry --all"),
)
def dead_letters() -> None:
    """Events that a receiver could not take, and that were kept.

    Exit codes: 0 well; 1 an error; 2 a wrong command line.
    """


@dead_letters.command("list", epilog=examples("pgsignals dead-letters list --json"))
@asking_outbox
def list_letters(cursor: Cursor) -> Answer:
    """List them, the latest last."""
    found = letters.dead_letters(cursor)
    table = partial(
        print_table,
        ("ID", "CONSUMER", "RECEIVER", "EVENT", "TRIES", "ERROR"),
        [(e.id, e.consumer, e.receiver, e.uid, e.attempts, e.error) for e in found],
        "There are no dead letters.",
    )
    return Answer({"dead_letters": found}, table)


@dead_letters.command("show", epilog=examples("pgsignals dead-letters show 1"))
@click.argument("id", type=int)
@asking_outbox
def show_letter(cursor: Cursor, id: int) -> Answer:  # noqa: A002
    """Show one, with its record's row, below the header of its message, and the traceback."""
    found = letters.dead_letter(cursor, id)
    # A row or an error may hold characters that would move the terminal's cursor.
    lines = (
        printable(f"{found.uid} for {found.receiver} of {found.consumer}, {found.at}"),
        printable(found.payload, "\n\t"),
        printable(found.traceback, "\n"),
    )
    return Answer(found, "\n".join(lines))


def _chosen(command: Command) -> Command:
    """Give a command ``ID …`` or ``--all``, as the parameter ``keys``."""

    @click.argument("ids", type=int, nargs=-1)
    @click.option("--all", "everything", is_flag=True, help="All that there are.")
    @wraps(command)
    def call(ids: tuple[int, ...], everything: bool, **given: Any) -> object:
        if bool(ids) == everything:
            raise click.UsageError("Give the ids of dead letters, or --all.")
        return command(keys=None if everything else ids, **given)

    return call


@dead_letters.command("retry", epilog=examples("pgsignals dead-letters retry 1 2"))
@_chosen
@asking_outbox
def retry_letters(cursor: Cursor, keys: Sequence[int] | None) -> Answer:
    """Have them delivered again, each to the receiver that could not take it.

    The active process of the consumer does it, at once, or as soon as there is one. What its
    receiver takes is a dead letter no more.
    """
    count = letters.retry(cursor, keys)
    return Answer({"retried": count}, f"{amount(count, 'dead letter')} will be delivered again.")


@dead_letters.command("drop", epilog=examples("pgsignals dead-letters drop --all"))
@_chosen
@asking_outbox
def drop_letters(cursor: Cursor, keys: Sequence[int] | None) -> Answer:
    """Forget them."""
    count = letters.drop_letters(cursor, keys)
    return Answer({"dropped": count}, f"{amount(count, 'dead letter')} dropped.")
