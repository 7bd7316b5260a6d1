"""The outbox stays small while a consumer is away, and nobody pays for that but the consumer.

Retention cap reached with a dead consumer: disk bounded, writers unaffected, Gap on return.
"""

from __future__ import annotations

import math
import threading

import psycopg2
import pytest

import pgsignals
from pgsignals.outbox.housekeeping import tidy
from tests.conftest import DEADLINE, Database, Recorder

RETENTION = 4_000_000
# Rows of 100,000 bytes.
TOTAL = 160
SIZE = (
    "SELECT sum(pg_total_relation_size(inhrelid))::bigint FROM pg_inherits"
    " WHERE inhparent = 'pgsignals.outbox'::regclass"
)


@pytest.fixture
def shop(dsn: str, db: Database) -> Database:
    """A database with a table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")
    return db


@pytest.mark.parametrize("pinned", [False, True], ids=["", "beside a transaction that lasts"])
def test_a_dead_consumer_beside_a_living_one(
    shop: Database, recorder: Recorder, pinned: bool
) -> None:
    """Bytes are bounded, writers neither fail nor wait, and the dead one gets a Gap on return.

    A transaction that lasts keeps the partition to which it wrote, and the others come in turn.
    """
    watcher = pgsignals.watch("items", "inserted", extra=["name"])
    dead, living = pgsignals.Hub(), pgsignals.Hub()
    dead.start(shop.dsn, [watcher], delivery="outbox", name="dead")
    assert dead.stop()
    living.on("items", "inserted")(lambda event: recorder(event.id))
    living.start(shop.dsn, [watcher], delivery="outbox", name="living")
    errors: list[BaseException] = []
    written = 0
    size = math.inf
    tidied = threading.Condition()

    def is_small() -> bool:
        return size < RETENTION

    def write() -> None:
        nonlocal written, size
        connection = psycopg2.connect(shop.dsn)
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                # Longer than housekeeping may wait for a lock, shorter than one that matters.
                cursor.execute("SET lock_timeout TO '500ms'")
                for _ in range(TOTAL):
                    cursor.execute("INSERT INTO items (name) VALUES (repeat('x', 100000))")
                    written += 1
                    if written % 10 == 0:
                        # Or the living one would be late as well, on a slow machine.
                        recorder.wait(written)
                        with tidied:
                            # And housekeeping comes more seldom than it does in proportion.
                            size = math.inf
                            assert tidied.wait_for(is_small, DEADLINE)
        except BaseException as error:
            errors.append(error)
        finally:
            connection.close()

    writer = threading.Thread(target=write)
    lasting = psycopg2.connect(shop.dsn)
    try:
        if pinned:
            lasting.cursor().execute("INSERT INTO items (id, name) VALUES (-1, 'lasting')")
            shop("INSERT INTO items (id, name) VALUES (-2, 'beside it')")
            assert recorder.wait(1) == [-2]
            recorder.items.clear()
        shop("UPDATE pgsignals.settings SET retention_bytes = %s", (RETENTION,))
        writer.start()
        largest = 0
        with shop.connection.cursor() as cursor:
            while writer.is_alive():
                tidy(cursor)
                [(found,)] = shop(SIZE)
                largest = max(largest, found)
                with tidied:
                    size = found
                    tidied.notify_all()
        writer.join()
        assert errors == []
        assert written == TOTAL
        # Four times as much was written.
        assert largest < 2 * RETENTION
        assert recorder.wait(TOTAL) == list(range(1, TOTAL + 1))
        lasting.commit()
        if pinned:
            assert recorder.wait(TOTAL + 1)[-1] == -1
        gaps = Recorder()
        dead.on_gap(gaps)
        last = Recorder()
        dead.on("items", "inserted")(lambda event: last(event.id))
        dead.start(shop.dsn, [watcher], delivery="outbox", name="dead")
        [gap] = gaps.wait(1)
        assert gap.reason == "retention"
        rest = [key for key in last.wait_until(lambda key: key == TOTAL, DEADLINE) if key > 0]
        # What is in the partition that was kept, and what came last.
        first = next(at for at, key in enumerate(rest) if key > at + 1)
        assert (first > 0) == pinned
        assert rest[first:] == list(range(rest[first], TOTAL + 1))
    finally:
        lasting.close()
        writer.join()
        living.stop()
        dead.stop()
