"""The outbox stays small while a consumer is away, and nobody pays for that but the consumer.

Retention cap reached with a dead consumer: disk bounded, writers unaffected, Gap on return.
"""

from __future__ import annotations

import functools
import threading

import psycopg2
import pytest
from conftest import DEADLINE, Database, Recorder

import pgsignals
from pgsignals.outbox.housekeeping import tidy

RETENTION = 4_000_000
SIZE = (
    "SELECT sum(pg_total_relation_size(inhrelid))::bigint FROM pg_inherits"
    " WHERE inhparent = 'pgsignals.outbox'::regclass"
)


@pytest.fixture
def shop(dsn: str, db: Database) -> Database:
    """A database with a table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")
    return db


def test_a_dead_consumer_beside_a_living_one(shop: Database, recorder: Recorder) -> None:
    """Bytes are bounded, writers neither fail nor wait, and the dead one gets a Gap on return."""
    watcher = pgsignals.watch("items", "inserted", extra=["name"])
    dead, living = pgsignals.Hub(), pgsignals.Hub()
    dead.start(shop.dsn, [watcher], delivery="outbox", name="dead")
    assert dead.stop()
    living.on("items", "inserted")(lambda event: recorder(event.id))
    living.start(shop.dsn, [watcher], delivery="outbox", name="living")
    errors: list[BaseException] = []
    written = rounds = 0
    tidied = threading.Condition()

    def write() -> None:
        nonlocal written
        connection = psycopg2.connect(shop.dsn)
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                # Longer than housekeeping may wait for a lock, shorter than one that matters.
                cursor.execute("SET lock_timeout TO '500ms'")
                for _ in range(250):
                    cursor.execute("INSERT INTO items (name) VALUES (repeat('x', 100000))")
                    written += 1
                    if written % 10 == 0:
                        # Or the living one would be late as well, on a slow machine.
                        recorder.wait(written)
                        with tidied:
                            until = functools.partial(lambda end: rounds >= end, rounds + 2)
                            assert tidied.wait_for(until, DEADLINE)
        except BaseException as error:
            errors.append(error)
        finally:
            connection.close()

    writer = threading.Thread(target=write)
    try:
        shop("UPDATE pgsignals.settings SET retention_bytes = %s", (RETENTION,))
        writer.start()
        largest = 0
        with shop.connection.cursor() as cursor:
            while writer.is_alive():
                tidy(cursor)
                [(size,)] = shop(SIZE)
                largest = max(largest, size)
                with tidied:
                    rounds += 1
                    tidied.notify_all()
        writer.join()
        assert errors == []
        assert written == 250
        # 25 MB were written.
        assert largest < 2 * RETENTION
        assert recorder.wait(250) == list(range(1, 251))
        gaps = Recorder()
        dead.on_gap(gaps)
        last = Recorder()
        dead.on("items", "inserted")(lambda event: last(event.id))
        dead.start(shop.dsn, [watcher], delivery="outbox", name="dead")
        [gap] = gaps.wait(1)
        assert gap.reason == "retention"
        rest = last.wait_until(lambda key: key == 250, DEADLINE)
        assert rest == list(range(rest[0], 251))
        assert rest[0] > 1
    finally:
        writer.join()
        living.stop()
        dead.stop()
