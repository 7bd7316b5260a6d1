"""Somebody locks a part of the outbox: whoever reads or tidies it waits without holding up more."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pgsignals import Event, Hub
from pgsignals.outbox.housekeeping import tidy
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually

LOCK = "BEGIN; LOCK TABLE pgsignals.outbox_{} IN ACCESS EXCLUSIVE MODE"


@pytest.fixture
def shop(each_db: Database) -> Database:
    """A database with a table."""
    each_db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    return each_db


@pytest.fixture
def locker(shop: Database, connect: Callable[[str], Database]) -> Database:
    """Another session, to lock in."""
    return connect(shop.dsn)


def start(hub: Hub, shop: Database) -> None:
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", lease=1.0)


def waiting(shop: Database) -> bool:
    """Whether somebody waits for the lock."""
    return bool(shop("SELECT 1 FROM pg_locks WHERE relation IS NOT NULL AND NOT granted"))


def test_a_consumer_keeps_its_claim(
    hub: Hub, shop: Database, locker: Database, recorder: Recorder
) -> None:
    """While its lock lasts nothing is read, and the claim renewed; then all comes, and once."""
    hub.on("items")(recorder)
    start(hub, shop)
    claim = "SELECT token, beat FROM pgsignals.consumers"
    [(token, beat)] = shop(claim)
    locker(LOCK.format(3))
    shop("INSERT INTO items DEFAULT VALUES")
    eventually(lambda: waiting(shop), bool)
    # Each third of the lease: for longer than the lease lasts.
    eventually(lambda: shop(claim), lambda found: found[0][1] > beat + 5)
    assert not recorder.items
    locker("COMMIT")
    [event] = recorder.wait(1)
    assert (event.id, event.redelivered) == (1, False)
    assert [each for each, _ in shop(claim)] == [token]
    assert hub.status().reconnects == 0


def test_a_dead_letter_is_kept_afterwards(hub: Hub, shop: Database, locker: Database) -> None:
    """An event that no receiver takes meanwhile is a dead letter once the lock is given up."""
    received, locked = threading.Event(), threading.Event()

    @hub.on("items", retries=0)
    def fail(event: Event) -> None:
        received.set()
        assert locked.wait(DEADLINE)
        raise ZeroDivisionError

    start(hub, shop)
    shop("INSERT INTO items DEFAULT VALUES")
    assert received.wait(DEADLINE)
    locker(LOCK.format(0))
    locked.set()
    eventually(lambda: waiting(shop), bool)
    locker("COMMIT")
    letters = "SELECT error FROM pgsignals.dead_letters"
    assert len(eventually(lambda: shop(letters), bool)) == 1
    assert hub.status().reconnects == 0


@pytest.mark.parametrize("segment", [0, 1, 3])
def test_the_housekeeper_passes_over_it(
    hub: Hub, shop: Database, locker: Database, segment: int
) -> None:
    """It tidies the other partitions, and none when that is locked which is being written."""
    start(hub, shop)
    hub.stop()
    shop("DELETE FROM pgsignals.consumers")
    shop("INSERT INTO items DEFAULT VALUES")
    with shop.connection.cursor() as cursor:
        cursor.execute("SET statement_timeout TO '30s'")
        assert tidy(cursor, segment_bytes=0) == []  # Another partition is begun, after the first.
        shop("INSERT INTO items DEFAULT VALUES")
        [(current,)] = shop("SELECT last_value FROM pgsignals.outbox_segment")
        assert current == 1
        locker(LOCK.format(segment))
        assert tidy(cursor) == ([0] if segment == 3 else [])
        locker("COMMIT")
        assert tidy(cursor) == ([] if segment == 3 else [0])
