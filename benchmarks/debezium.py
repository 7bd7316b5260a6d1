"""Relaying live to Kafka, beside Debezium: all the processor time that a transaction takes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psycopg2.extensions import parse_dsn

import pgsignals
from pgsignals.testing import Server

from .harness import (
    DEADLINE,
    INSERT_ONE,
    SETTINGS,
    Bench,
    Figure,
    Miscounted,
    connect,
    execute,
    ratios,
    shop,
)
from .processes import Child, hear, processor_seconds, say
from .relay import kafka_records, started

TRANSACTIONS = 200_000
_WRITERS = 2
_POM = Path(__file__).parent / "debezium" / "pom.xml"
# What Debezium's documentation and users advise for throughput.
_TUNED = {
    "max.batch.size": "8192",
    "max.queue.size": "32768",
    "poll.interval.ms": "10",
    "producer.override.linger.ms": "5",
    "producer.override.batch.size": "262144",
    "producer.override.compression.type": "lz4",
}


@dataclass
class _Side:
    """A relay at work on a server of its own: one that reads the log reads that of all databases.

    ``process`` is what relays, and ``prefix`` that of its topic.
    """

    server: Server
    dsn: str
    process: int
    prefix: str
    rates: list[float] = field(default_factory=list)
    used: dict[str, list[float]] = field(default_factory=dict)

    def run(self, broker: Any, count: int) -> None:
        """Write, wait until the broker has it all, and note what that took, in µs each."""
        before = kafka_records(broker.url, self.prefix)
        pids = {
            "database": self.server.pid,
            "relay": self.process,
            "broker": broker.process.pid,
        }
        used = {part: processor_seconds(pid) for part, pid in pids.items()}
        began = time.perf_counter()
        writers = [
            threading.Thread(target=_write, args=(self.dsn, count // _WRITERS))
            for _ in range(_WRITERS)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        deadline = time.monotonic() + DEADLINE
        while (found := kafka_records(broker.url, self.prefix) - before) < count:
            if time.monotonic() > deadline:
                raise Miscounted(f"the broker has {found:,} records of {count:,} rows")
            time.sleep(0.1)
        if found > count:
            raise Miscounted(f"the broker has {found:,} records of {count:,} rows")
        self.rates.append(count / (time.perf_counter() - began))
        for part, pid in pids.items():
            took = 1e6 * (processor_seconds(pid) - used[part]) / count
            self.used.setdefault(part, []).append(took)

    @property
    def totals(self) -> list[float]:
        """The processor time of all parts, for each round but the first, which warms up."""
        return [sum(parts) for parts in zip(*self.used.values(), strict=True)][1:]


def measure(bench: Bench) -> list[Figure]:
    """Single-row transactions, as fast as two clients can, relayed meanwhile."""
    count = bench.scaled(TRANSACTIONS)
    with ExitStack() as stack:
        broker = stack.enter_context(started("kafka"))
        sides = {
            "Debezium": stack.enter_context(_debezium(broker)),
            "outbox": stack.enter_context(_relay(broker, "outbox")),
            "WAL": stack.enter_context(_relay(broker, "wal")),
        }
        order = [*sides]
        for _ in range(1 + bench.rounds):
            for name in order:
                sides[name].run(broker, count)
            order.reverse()
    theirs = sides["Debezium"]
    what = f"{count:,} transactions to Kafka, all processor time ÷ Debezium's"
    figures = []
    for name, target in (("WAL", 1.0), ("outbox", None)):
        figures.append(
            Figure(f"{what}, {name}", ratios(sides[name].totals, theirs.totals), "", target)
        )
    for name, side in sides.items():
        figures.append(Figure(f"  {name}, a transaction", side.totals, "µs"))
        figures += [
            Figure(f"    of which the {part}", used[1:], "µs") for part, used in side.used.items()
        ]
    return figures


def _write(dsn: str, count: int) -> None:
    connection = connect(dsn)
    execute(connection, "SET synchronous_commit = off")
    execute(
        connection, f"DO $$ BEGIN FOR n IN 1..{count} LOOP {INSERT_ONE}; COMMIT; END LOOP; END $$"
    )
    connection.close()


@contextmanager
def _relay(broker: Any, delivery: str) -> Iterator[_Side]:
    prefix = f"live-{delivery}"
    with Server(settings=SETTINGS, fsync=True) as server:
        dsn = shop(server)
        url = f"{broker.url}?prefix={prefix}&create=true"
        with Child(__name__, dsn, url, delivery) as child:
            yield _Side(server, dsn, child.hear(), prefix)


def _run(dsn: str, url: str, delivery: str) -> None:
    """What ``pgsignals relay`` does, in a process of its own."""
    import os

    with pgsignals.Hub() as hub:
        hub.start(
            dsn,
            [pgsignals.watch("orders", "inserted", extra=_EXTRA)],
            delivery=delivery,
            name="bench",
            backends=[url],
            workers=0,
            allow_unbounded_wal=delivery == "wal",
        )
        say(os.getpid())
        hear()


# As much of each row as Debezium sends.
_EXTRA = ("customer_id", "status", "total", "created_at")


@contextmanager
def _debezium(broker: Any) -> Iterator[_Side]:
    from tests.brokers import Process, classpath, free_port

    port = free_port()
    with Server(settings=SETTINGS, fsync=True) as server:
        dsn = shop(server)
        given = parse_dsn(dsn)
        connect_ = Process("connect")
        worker = {
            "bootstrap.servers": broker.url.partition("://")[2].rstrip("/"),
            "listeners": f"http://127.0.0.1:{port}",
            "offset.storage.file.filename": str(connect_.folder / "offsets"),
            "connector.client.config.override.policy": "All",
            **{
                f"{part}.converter{option}": value
                for part in ("key", "value")
                for option, value in (
                    ("", "org.apache.kafka.connect.json.JsonConverter"),
                    (".schemas.enable", "false"),
                )
            },
        }
        connector = {
            "name": "debezium",
            "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
            "plugin.name": "pgoutput",
            "database.hostname": "127.0.0.1",
            "database.port": given["port"],
            "database.user": given["user"],
            "database.password": given.get("password", ""),
            "database.dbname": given["dbname"],
            "topic.prefix": "debezium",
            "table.include.list": "public.orders",
            "publication.autocreate.mode": "filtered",
            "snapshot.mode": "no_data",
            "topic.creation.default.replication.factor": "1",
            "topic.creation.default.partitions": "4",
            **_TUNED,
        }
        files = []
        for name, properties in (("worker", worker), ("connector", connector)):
            path = connect_.folder / f"{name}.properties"
            path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
            files.append(str(path))
        program = "org.apache.kafka.connect.cli.ConnectStandalone"
        jars = classpath(_POM, "Debezium")
        quiet = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
        try:
            connect_.launch(["java", "-Xmx2g", "-cp", jars, quiet, program, *files], port)
            assert connect_.process is not None
            _await_topic(dsn, broker)
            yield _Side(server, dsn, connect_.process.pid, "debezium")
        finally:
            connect_.close()


def _await_topic(dsn: str, broker: Any) -> None:
    """Write rows until Debezium relays them: it says nowhere else that it has begun."""
    deadline = time.monotonic() + DEADLINE
    while not kafka_records(broker.url, "debezium"):
        if time.monotonic() > deadline:
            raise RuntimeError("Debezium relays nothing")
        _write(dsn, 1)
        time.sleep(0.5)
    # What was written meanwhile comes, too.
    time.sleep(2.0)


if __name__ == "__main__":
    _run(*sys.argv[1:])
