"""``pgsignals retention``: how much the outbox keeps for consumers that are late."""

from __future__ import annotations

import click
from psycopg2.extensions import cursor as Cursor

from pgsignals.outbox.inspection import read_outbox
from pgsignals.outbox.retention_settings import read_retention, set_retention

from .outbox import Answer, asking_outbox
from .output import examples
from .units import parse_size, parse_time, size_text, time_text


@click.command(
    epilog=examples(
        "pgsignals retention",
        "pgsignals retention --time 7d --size 20GiB",
    )
)
@click.option("--time", "seconds", metavar="TIME", type=parse_time, help="At least 60s: 12h, 7d.")
@click.option("--size", "size", metavar="SIZE", type=parse_size, help="At least 8MiB: 20GiB.")
@asking_outbox
def retention(cursor: Cursor, seconds: float | None, size: int | None) -> Answer:
    """Show or set how much of the outbox is kept for consumers that are late.

    What a consumer has not read is dropped when it is older than --time, and the oldest of it when
    the outbox is larger than --size. Consumers that lose events by that get a Gap.

    Exit codes: 0 well; 1 an error; 2 a wrong command line.
    """
    if seconds is None and size is None:
        kept = read_retention(cursor)
    else:
        kept = set_retention(cursor, seconds, size)
    outbox = read_outbox(cursor)
    answer = {"seconds": kept.seconds, "bytes": kept.bytes, "used_bytes": outbox.bytes}
    text = (
        f"What is not read is kept for {time_text(kept.seconds)}, in up to "
        f"{size_text(kept.bytes)}. The outbox has {size_text(outbox.bytes)} now."
    )
    late = [
        f"The consumer {each.name!r} is {time_text(each.lag_seconds)} behind: consumers at work "
        "will drop what it has not read, which is a Gap."
        for each in outbox.consumers
        if each.lag and (each.lag_seconds > kept.seconds or outbox.bytes > kept.bytes)
    ]
    return Answer(answer, text, late)
