"""One statement that inserts 100,000 rows: what watching adds to it, and how soon all arrive."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from . import pubsub
from .baselines import ROW_TRIGGER, select_loop
from .harness import (
    INSERT_MANY,
    Bench,
    Counter,
    Figure,
    connect,
    consuming,
    execute,
    interleave,
    ratios,
    reading,
    watching,
)


class Side:
    """Inserts into one database, and keeps what each round took (in seconds)."""

    def __init__(self, dsn: str, rows: int, counter: Counter | None = None) -> None:
        self._connection = connect(dsn)
        self.rows = rows
        self._delivered: list[float] = []
        self._counter = counter

    def run(self) -> float:
        """How long the statement took."""
        execute(self._connection, "TRUNCATE orders")
        if self._counter is not None:
            self._counter.expect(self.rows)
        began = time.perf_counter()
        execute(self._connection, INSERT_MANY, (self.rows,))
        statement = time.perf_counter() - began
        if self._counter is not None:
            self._delivered.append(self._counter.wait() - began)
        return statement

    @property
    def delivered(self) -> list[float]:
        """From the start of each statement to the last receiver's call, but of the warm-up."""
        return self._delivered[1:]

    @property
    def rates(self) -> list[float]:
        """The same in events per second."""
        return [self.rows / seconds for seconds in self.delivered]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


PARTITIONED = """
    DROP TABLE orders;
    CREATE TABLE orders (
        id bigserial PRIMARY KEY,
        customer_id bigint NOT NULL,
        status text NOT NULL DEFAULT 'new',
        total numeric(10, 2) NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    ) PARTITION BY HASH (id);
""" + "".join(
    f"CREATE TABLE orders_{n} PARTITION OF orders FOR VALUES WITH (MODULUS 8, REMAINDER {n});"
    for n in range(8)
)


def partitioned(bench: Bench) -> list[Figure]:
    """What the statement costs where the table has eight partitions."""
    rows = bench.scaled(100_000)
    with ExitStack() as stack:
        sides = {"unwatched": Side(bench.shop(PARTITIONED), rows)}
        for name, listen in (("notify", watching), ("outbox", consuming), ("wal", reading)):
            dsn, counter = bench.shop(PARTITIONED), Counter()
            stack.enter_context(listen(dsn, counter))
            sides[name] = Side(dsn, rows, counter)
        for side in sides.values():
            stack.callback(side.close)
        took = interleave(bench.rounds, {name: partial(side.run) for name, side in sides.items()})
    what = f"INSERT of {rows:,} rows into 8 partitions, watched ÷ unwatched"
    return [
        Figure(what, ratios(took["notify"], took["unwatched"]), "", 3),
        Figure("  the same in outbox delivery", ratios(took["outbox"], took["unwatched"]), "", 4),
        Figure("  the same in WAL delivery", ratios(took["wal"], took["unwatched"]), "", 1.1),
        Figure("  unwatched", [1000 * seconds for seconds in took["unwatched"]], "ms"),
    ]


def measure(bench: Bench) -> list[Figure]:
    """What the statement costs, and the events per second up to the last receiver's call."""
    rows = bench.scaled(100_000)
    # django-pgpubsub asks the database something for each event.
    fewer = rows // 50
    with ExitStack() as stack:
        sides = {"unwatched": Side(bench.shop(), rows)}
        for name, listen, size, *statements in (
            ("notify", watching, rows),
            ("outbox", consuming, rows),
            ("wal", reading, rows),
            ("row trigger", select_loop, rows, ROW_TRIGGER),
            ("pubsub", pubsub.listening, fewer),
        ):
            dsn, counter = bench.shop(*statements), Counter()
            stack.enter_context(listen(dsn, counter))
            sides[name] = Side(dsn, size, counter)
        for side in sides.values():
            stack.callback(side.close)
        runs: dict[str, Callable[[], float]] = {
            name: partial(side.run) for name, side in sides.items()
        }
        took = interleave(bench.rounds, runs)
    ours, theirs = sides["notify"], sides["row trigger"]
    return [
        Figure(
            f"INSERT of {rows:,} rows, watched ÷ unwatched",
            ratios(took["notify"], took["unwatched"]),
            "",
            1.25,
        ),
        Figure("  the same in outbox delivery", ratios(took["outbox"], took["unwatched"]), ""),
        Figure("  the same in WAL delivery", ratios(took["wal"], took["unwatched"]), ""),
        Figure("  the same with a row trigger", ratios(took["row trigger"], took["unwatched"]), ""),
        Figure("  unwatched", [1000 * seconds for seconds in took["unwatched"]], "ms"),
        Figure(
            f"INSERT of {rows:,} rows to last receiver called",
            ours.rates,
            "events/s",
            150_000,
            at_most=False,
        ),
        Figure("  in outbox delivery", sides["outbox"].rates, "events/s"),
        Figure("  in WAL delivery", sides["wal"].rates, "events/s"),
        Figure("  row trigger and select() loop", theirs.rates, "events/s"),
        Figure(f"  django-pgpubsub, {fewer:,} rows", sides["pubsub"].rates, "events/s"),
        Figure(
            "  ours ÷ row trigger and select() loop",
            ratios(theirs.delivered, ours.delivered),
            "",
            2.5,
            at_most=False,
        ),
    ]
