"""A consumer that was away: 1,000,000 events wait for its receivers, in outbox or log."""

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
    drop_slots,
    execute,
    ratios,
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
    delivery: str = "outbox",
) -> None:
    """Write orders while no process of the named consumers runs.

    ``backends`` has the URL of a broker for each that relays.
    """
    for name in names:
        with pgsignals.Hub() as hub:
            hub.start(
                dsn,
                [pgsignals.watch("orders", "inserted")],
                delivery=delivery,
                name=name,
                backends=[backends[name]] if backends else [],
                workers=0 if backends else 1,
                allow_unbounded_wal=delivery == "wal",
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
    """Each round has a consumer of each delivery, in a process of its own; all read the same.

    A database holds the backlog of one delivery, which the other one's triggers would burden.
    """
    rows = bench.scaled(1_000_000)
    names = [f"round{number}" for number in range(bench.rounds)]
    figures = []
    for what, single, least in (("of one statement", False, 0.45), ("of single rows", True, 0.55)):
        dsns = {delivery: bench.shop() for delivery in ("outbox", "wal")}
        for delivery, dsn in dsns.items():
            leave_backlog(dsn, names, rows, single, delivery=delivery)
        rates: dict[str, list[float]] = {"outbox": [], "wal": []}
        growth: dict[str, list[float]] = {"outbox": [], "wal": []}
        for number, name in enumerate(names):
            for delivery in [*dsns][:: -1 if number % 2 else 1]:
                seconds, grown = _catch_up(dsns[delivery], name, rows, delivery)
                rates[delivery].append(rows / seconds)
                growth[delivery].append(grown)
        for dsn in dsns.values():
            drop_slots(dsn)
        figures += [
            Figure(
                f"outbox catch-up, {rows:,} events {what}",
                rates["outbox"],
                "events/s",
                75_000,
                at_most=False,
            ),
            Figure("  memory growth meanwhile", growth["outbox"], "MB"),
            Figure("  in WAL delivery", rates["wal"], "events/s"),
            Figure("  ÷ outbox", ratios(rates["wal"], rates["outbox"]), "", least, at_most=False),
            Figure("  memory growth in WAL delivery", growth["wal"], "MB", 10.0),
        ]
    return figures


def _catch_up(dsn: str, name: str, rows: int, delivery: str) -> tuple[float, float]:
    """Seconds from ``start`` to the last receiver's call, and megabytes."""
    with Child(__name__, dsn, name, rows, delivery) as consumer:
        seconds, grown = consumer.hear()
    return seconds, grown


def consume(dsn: str, name: str, rows: int, delivery: str) -> tuple[float, float]:
    """The same in this process."""
    counter = Counter()
    counter.expect(rows)
    before = megabytes("VmRSS")
    began = time.perf_counter()
    with consuming(dsn, counter, name, delivery):
        ended = counter.wait()
    counter.check()
    return ended - began, megabytes("VmHWM") - before


if __name__ == "__main__":
    say(consume(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
