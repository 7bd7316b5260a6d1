"""A consumer of the write-ahead log when its server dies and a standby is promoted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime

import psycopg2
import pytest

import pgsignals
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.standby import Standby
from tests.waiting import eventually
from tests.wal import check_deliveries, start

RECORDS = 5
SETTINGS = {"wal_level": "logical", "shared_buffers": "16MB", "wal_writer_delay": "10ms"}


@pytest.fixture
def primary(each_version: int) -> Iterator[Server]:
    """A server that can have standbys."""
    with Server(each_version, SETTINGS) as server:
        yield server


class Writer:
    """Counts records up, one after another, at whichever server takes writes, until it is ended."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.committed = 0

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(DEADLINE)

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                with closing(psycopg2.connect(self._dsn, connect_timeout=2)) as connection:
                    while not self._ending.is_set():
                        self._write(connection)
            except psycopg2.Error:
                self._ending.wait(0.05)

    def _write(self, connection: psycopg2.extensions.connection) -> None:
        with connection, connection.cursor() as cursor:
            cursor.execute(
                "WITH changed AS (UPDATE items SET n = n + 1 WHERE id = %s RETURNING id, n)"
                " INSERT INTO history SELECT id, n, clock_timestamp() FROM changed",
                (self.committed % RECORDS,),
            )
        self.committed += 1

    def until_more(self, count: int = 50) -> None:
        """Wait until so many more have been committed."""
        before = self.committed
        eventually(lambda: self.committed, lambda now: now >= before + count)


@pytest.mark.parametrize("failover", [True, False], ids=["failover slots", "no such slots"])
def test_a_standby_is_promoted(
    hub: pgsignals.Hub,
    primary: Server,
    connect: Callable[[str], Database],
    recorder: Recorder,
    failover: bool,
) -> None:
    """The consumer goes on at the new primary: a promotion is a Gap, and what is lost lies in one.

    With a copy of its slot nothing is lost that the standby had, and nothing was delivered that it
    had not. Without, the consumer makes another slot, and says so.
    """
    if failover and primary.version < 17:
        pytest.skip("PostgreSQL 17 brought them")
    primary.create_database("shop")
    with Standby(primary) as standby:
        hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        dsn = f"postgresql://postgres@{hosts}/shop?target_session_attrs=read-write"
        db = connect(dsn)
        db(
            "CREATE TABLE items (id int PRIMARY KEY, n int NOT NULL DEFAULT 0);"
            "CREATE TABLE history (id int, n int, at timestamptz, PRIMARY KEY (id, n))"
        )
        db("INSERT INTO items SELECT generate_series(0, %s)", (RECORDS - 1,))
        messages, told = Recorder(), Recorder()
        hub.on("items", "updated")(recorder)
        hub.on("differs")(messages)
        hub.on_gap(told)
        start(
            hub,
            dsn,
            pgsignals.watch("items", "updated", extra=["n"]),
            pgsignals.watch("items", "updated", columns=["n"], extra=["n"], label="differs"),
        )
        with Writer(dsn) as writer:
            recorder.wait(50)
            if failover:
                standby.copy_slots()
            writer.until_more()
            primary.stop("immediate")
            standby.promote()
            told.wait_until(lambda gap: gap.reason == "restored")
            writer.until_more()
        history: dict[tuple[int, int], datetime] = {
            (number, n): at for number, n, at in connect(dsn)("SELECT id, n, at FROM history")
        }
        last = max(history, key=lambda each: history[each])
        for received in (recorder, messages):
            events = received.wait_until(lambda event: (event.id, event.values["n"]) == last)
            check_deliveries(events, "n")
            delivered = {(event.id, event.values["n"]) for event in events}
            missing = history.keys() - delivered
            for each in missing:
                assert any(gap.since <= history[each] <= gap.until for gap in told.items), each
            if failover:
                assert missing == set()
                assert delivered <= history.keys()
        details = [gap.detail for gap in told.items]
        assert sum("promoted" in each for each in details) == 1
        if not failover:
            assert any("replication slot" in each for each in details)
        hub.stop()
