"""A consumer that was away: 1,000,000 events wait in the outbox for its receivers."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence

import pgsignals

from .harness import (
    INSERT_MANY,
    INSERT_ONE,
    Bench,
    Counter,
    Figure,
    connect,
    consuming,
    execute,
)
from .processes import Child, megabytes, say

# Single-row statements in transactions of this many: a commit for each would take the writer
# longer than all the rest, and is nothing to the reader.
_IN_TRANSACTION = 100


def leave_backlog(
    dsn: str,
    names: Sequence[str],
    rows: int,
    single: bool,
    backends: Mapping[str, str] | None = None,
) -> None:
    """Write orders while no process of the named consumers runs.

    ``backends`` has the URL of a broker for each that relays.
    """
    for name in names:
        with pgsignals.Hub() as hub:
            hub.start(
                dsn,
                [pgsignals.watch("orders", "inserted")],
                delivery="outbox",
                name=name,
                backends=[backends[name]] if backends else [],
                workers=0 if backends else 1,
            )
    if not single:
        connection = connect(dsn)
        execute(connection, INSERT_MANY, (rows,))
        connection.close()
        return
    writers = [threading.Thread(target=_write_singly, args=(dsn, rows // 2)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()


def _write_singly(dsn: str, rows: int) -> None:
    connection = connect(dsn)
    execute(connection, "SET synchronous_commit = off")
    execute(
        connection,
        f"""DO $$ BEGIN
          FOR n IN 1..{rows} LOOP
            {INSERT_ONE};
            IF n % {_IN_TRANSACTION} = 0 THEN COMMIT; END IF;
          END LOOP;
        END $$""",
    )
    connection.close()


def measure(bench: Bench) -> list[Figure]:
    """Each round is a consumer of its own, in a process of its own; all read the same backlog."""
    rows = bench.scaled(1_000_000)
    names = [f"round-{number}" for number in range(bench.rounds)]
    figures = []
    for what, single in (("of one statement", False), ("of single rows", True)):
        dsn = bench.shop()
        leave_backlog(dsn, names, rows, single)
        rates, growth = [], []
        for name in names:
            seconds, grown = _catch_up(dsn, name, rows)
            rates.append(rows / seconds)
            growth.append(grown)
        figures += [
            Figure(
                f"outbox catch-up, {rows:,} events {what}",
                rates,
                "events/s",
                75_000,
                at_most=False,
            ),
            Figure("  memory growth meanwhile", growth, "MB"),
        ]
    return figures


def _catch_up(dsn: str, name: str, rows: int) -> tuple[float, float]:
    """Seconds from ``start`` to the last receiver's call, and megabytes."""
    with Child(__name__, dsn, name, rows) as consumer:
        seconds, grown = consumer.hear()
    return seconds, grown


def consume(dsn: str, name: str, rows: int) -> tuple[float, float]:
    """The same in this process."""
    counter = Counter()
    counter.expect(rows)
    before = megabytes("VmRSS")
    began = time.perf_counter()
    with consuming(dsn, counter, name):
        ended = counter.wait()
    counter.check()
    return ended - began, megabytes("VmHWM") - before


if __name__ == "__main__":
    say(consume(sys.argv[1], sys.argv[2], int(sys.argv[3])))
