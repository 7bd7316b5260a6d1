"""``pgsignals retention``: how much the outbox keeps for those who are late."""

from __future__ import annotations

import click
from psycopg2.extensions import cursor as Cursor

from pgsignals.jsontext import to_json
from pgsignals.outbox.inspection import OutboxState, read_outbox
from pgsignals.outbox.retention import Retention, read_retention, set_retention

from .outbox import _run, dsn_option, json_option
from .output import examples, notice
from .units import parse_size, parse_time, size_text, time_text


@click.command(
    epilog=examples(
        "pgsignals retention",
        "pgsignals retention --time 7d --size 20GiB",
    )
)
@click.option("--time", "seconds", metavar="TIME", type=parse_time, help="At least 60s: 12h, 7d.")
@click.option("--size", "size", metavar="SIZE", type=parse_size, help="At least 8MiB: 20GiB.")
@dsn_option
@json_option
def retention(seconds: float | None, size: int | None, dsn: str, as_json: bool) -> None:
    """Show or set how much of the outbox is kept for consumers that are late.

    What a consumer has not read is dropped when it is older than --time, and the oldest of it when
    the outbox is larger than --size. Consumers that lose events by that get a Gap.

    Exit codes: 0 well; 1 an error; 2 a wrong command line.
    """

    def act(cursor: Cursor) -> tuple[Retention, OutboxState]:
        if seconds is None and size is None:
            return read_retention(cursor), read_outbox(cursor)
        return set_retention(cursor, seconds, size), read_outbox(cursor)

    kept, outbox = _run(dsn, act)
    if as_json:
        answer = {"seconds": kept.seconds, "bytes": kept.bytes, "used_bytes": outbox.bytes}
        click.echo(to_json(answer))
    else:
        click.echo(
            f"What is not read is kept for {time_text(kept.seconds)}, in up to "
            f"{size_text(kept.bytes)}. The outbox has {size_text(outbox.bytes)} now."
        )
    for late in _late(outbox, kept):
        notice(f"{late}: consumers at work will drop what it has not read, which is a Gap.")


def _late(outbox: OutboxState, kept: Retention) -> list[str]:
    return [
        f"The consumer {each.name!r} is {time_text(each.lag_seconds)} behind"
        for each in outbox.consumers
        if each.lag and (each.lag_seconds > kept.seconds or outbox.bytes > kept.bytes)
    ]
