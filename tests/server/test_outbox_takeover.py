"""Several processes of one name: who takes over, when, and what the former one still does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psycopg2
import pytest

from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database
from tests.consumers import LEASE, consumers, insert
from tests.proxy import Proxy


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")


@pytest.mark.parametrize(
    ("number", "lease"),
    [(signal.SIGKILL, 3600.0), (signal.SIGTERM, 3600.0), (signal.SIGSTOP, LEASE)],
)
def test_a_standby_takes_over(dsn: str, db: Database, number: signal.Signals, lease: float) -> None:
    """When the active process has gone, however long its lease, and after that when it hangs."""
    with consumers(dsn, dsn, lease=lease) as (active, standby):
        assert insert(db) == active.out()
        active.process.send_signal(number)
        fresh, former = insert(db), ["1"]
        # Told to end, it may take that one too, and then acknowledges it.
        if number == signal.SIGTERM and fresh in active.end().out:
            former.append(fresh)
            fresh = insert(db)
        # What the former one may not have acknowledged comes again.
        while (line := standby.out()) != fresh:
            assert line in former


def test_a_stopped_process_goes_on_as_a_standby(dsn: str, db: Database) -> None:
    """Continued, it does not deliver as if it were still active, until the other one has gone."""
    with consumers(dsn, dsn) as (active, standby):
        assert insert(db) == active.out()
        active.process.send_signal(signal.SIGSTOP)
        fresh = insert(db)
        while standby.out() != fresh:
            pass
        active.process.send_signal(signal.SIGCONT)
        keys = [insert(db) for _ in range(50)]
        assert [standby.out() for _ in keys] == keys
        standby.process.terminate()
        assert standby.out() == "ended"
        last = insert(db)
        assert active.out() == last


def test_a_process_in_a_black_hole_ends_delivering(dsn: str, db: Database) -> None:
    """Longer than its lease without an answer, it begins no call; the other one has taken over."""
    address, _, name = dsn.rpartition("/")
    host, _, port = address.rpartition(":")
    with Proxy("127.0.0.1", int(port)) as proxy:
        through = f"{host}:{proxy.port}/{name}"
        with consumers(through, dsn) as (active, standby):
            assert insert(db) == active.out()
            proxy.stall()
            fresh = insert(db)
            while standby.out() != fresh:
                pass
            proxy.resume()
            keys = [insert(db) for _ in range(50)]
            assert [standby.out() for _ in keys] == keys
            standby.process.terminate()
            assert standby.out() == "ended"
            last = insert(db)
            assert active.out() == last


@pytest.mark.parametrize("crash", ["the server", "a session"])
def test_a_crash_of_the_server_ends_no_claim(
    crash: str, connect: Callable[[str], Database]
) -> None:
    """One that is cut off does not know of it, and may deliver until its lease is over."""
    with Server() as server, Proxy("127.0.0.1", server.port) as proxy:
        dsn = server.create_database()
        address, _, name = dsn.rpartition("/")
        through = f"{address.rpartition(':')[0]}:{proxy.port}/{name}"
        db = connect(dsn)
        db("CREATE TABLE items (id bigserial PRIMARY KEY)")
        with consumers(through, dsn) as (active, standby):
            assert insert(db) == active.out()
            renewed = renewed_after(db)
            proxy.stall()
            if crash == "the server":
                server.stop("immediate")
                server.start()
            else:
                # The postmaster ends all others then, and goes on.
                [(backend,)] = db("SELECT pg_backend_pid()")
                os.kill(backend, signal.SIGKILL)
            fresh = insert_once_it_is_back(connect, dsn)
            while standby.out() != fresh:
                pass
            assert time.monotonic() > renewed + LEASE


def renewed_after(db: Database) -> float:
    """Wait until the claim is renewed; a moment after which that was."""
    beat = "SELECT beat FROM pgsignals.consumers"
    former, not_yet = db(beat), time.monotonic()
    while True:
        asked = time.monotonic()
        if db(beat) != former:
            return not_yet
        not_yet = asked


def insert_once_it_is_back(connect: Callable[[str], Database], dsn: str) -> str:
    """As soon as a server takes it, which may send away who comes before it knows of the crash."""
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            return insert(connect(dsn))
        except psycopg2.OperationalError:
            if time.monotonic() > deadline:
                raise


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_records(dsn: str, db: Database, count: int) -> None:
    """All have their share of the parts, and the others take over those of one that is killed."""
    with consumers(*[dsn] * count, partitions=4) as found:
        shares = (
            "SELECT count(DISTINCT holder), count(*) FROM pgsignals.consumers WHERE holder <> ''"
        )
        deadline = time.monotonic() + DEADLINE
        while db(shares) != [(count, 4)]:
            assert time.monotonic() < deadline, db("SELECT part, holder FROM pgsignals.consumers")
            found[0].process.poll()
        holders = dict(db("SELECT holder, count(*) FROM pgsignals.consumers GROUP BY 1"))
        assert set(holders.values()) == {4 // count}
        if count == 1:
            return
        found[-1].process.kill()
        while db(shares) != [(count - 1, 4)]:
            assert time.monotonic() < deadline, db("SELECT part, holder FROM pgsignals.consumers")
