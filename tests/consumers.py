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

@pgsignals.on("items", "inserted")
def receive(event):
    say(event.id)

partitions, lease = int(sys.argv[1]), float(sys.argv[2])
pgsignals.start(os.environ["PGSIGNALS_DSN"], ["items"], delivery="outbox", name="mailer",
                partitions=partitions, lease=lease, heartbeat_timeout=60.0)
say("started")
pgsignals.run()
say("ended")
"""


@contextmanager
def consumers(*dsns: str, partitions: int = 1, lease: float = LEASE) -> Iterator[list[Forked]]:
    """Processes of one name, the first of which is active when the others start."""
    found: list[Forked] = []
    try:
        for dsn in dsns:
            found.append(Forked("-c", CONSUME, str(partitions), str(lease), dsn=dsn))
            assert found[-1].out() == "started"
        yield found
    finally:
        for each in found:
            each.process.kill()
            each.process.wait()


def insert(db: Database) -> str:
    [(key,)] = db("INSERT INTO items DEFAULT VALUES RETURNING id")
    return str(key)
