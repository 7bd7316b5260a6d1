"""Consumers in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.conftest import Database
from tests.forked import Forked

LEASE = 2.0


CONSUME = """
import os, sys
import psycopg2, pgsignals

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

partitions, lease, delivery = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
marking = sys.argv[4] == "marking"

@pgsignals.on("items", "inserted")
def receive(event):
    say(event.id, *(["again"] if marking and event.redelivered else []))

pgsignals.start(os.environ["PGSIGNALS_DSN"], ["items"], delivery=delivery, name="mailer",
                partitions=partitions, lease=lease, heartbeat_timeout=60.0)
say("started")
pgsignals.run()
say("ended")
"""


@contextmanager
def consumers(
    *dsns: str,
    partitions: int = 1,
    lease: float = LEASE,
    delivery: str = "outbox",
    marking: bool = False,
) -> Iterator[list[Forked]]:
    """Processes of one name, the first of which is active when the others start.

    They say the key of each item; with ``marking``, also that it came again.
    """
    options = (str(partitions), str(lease), delivery, "marking" if marking else "")
    found: list[Forked] = []
    try:
        for dsn in dsns:
            found.append(Forked("-c", CONSUME, *options, dsn=dsn))
            assert found[-1].out() == "started"
        yield found
    finally:
        for each in found:
            each.process.kill()
            each.process.wait()


def insert(db: Database) -> str:
    [(key,)] = db("INSERT INTO items DEFAULT VALUES RETURNING id")
    return str(key)
