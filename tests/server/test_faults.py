"""Breaking the connection in every way: nothing is missed without a Gap."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import pytest

import pgsignals
from pgsignals import Gap, Hub
from pgsignals.core.backoff import Backoff
from pgsignals.sources import thread as source
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.proxy import Proxy
from tests.sources import source_session, source_thread
from tests.waiting import eventually

# Of a busy machine, an answer may take its time: a connection that is given up for it is no fault.
HEARTBEAT = {"heartbeat": 0.3, "heartbeat_timeout": 2.0}


def through(proxy: Proxy, dsn: str) -> str:
    """The DSN of the same database by way of the proxy."""
    parts = urlsplit(dsn)
    user = f"{parts.username}@" if parts.username else ""
    return urlunsplit(parts._replace(netloc=f"{user}127.0.0.1:{proxy.port}"))


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy before the server."""
    with Proxy("127.0.0.1", server.port) as made:
        yield made


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")


def test_a_black_hole_is_noticed(hub: Hub, dsn: str, db: Database, proxy: Proxy) -> None:
    """A connection that goes silent is replaced within the heartbeat and its timeout."""
    lost, gaps = Recorder(), Recorder()
    hub.disconnected.connect(lambda hub, error: lost(error), weak=False)
    hub.on_gap(gaps)
    hub.start(dsn, ["items"], listen_dsn=through(proxy, dsn), **HEARTBEAT)
    began = time.monotonic()
    proxy.stall()
    db("INSERT INTO items DEFAULT VALUES")
    [error] = lost.wait(1, timeout=DEADLINE)
    assert "heartbeat" in str(error)
    # Far more than the bound, since the machine may be busy; without a heartbeat it takes hours.
    assert time.monotonic() - began < sum(HEARTBEAT.values()) + 10
    proxy.resume()
    assert gaps.wait(1)[0].reason == "reconnected"


def test_a_quiet_connection_is_left_alone(
    hub: Hub, dsn: str, db: Database, proxy: Proxy, recorder: Recorder, looks: Recorder
) -> None:
    """Heartbeats that are answered cause neither a Gap nor a new connection."""
    hub.on_gap(recorder)
    hub.start(dsn, ["items"], listen_dsn=through(proxy, dsn), heartbeat=0.01)
    session = source_session(db)
    # Each heartbeat that is answered is followed by a look at the triggers.
    looks.wait(len(looks.items) + 5)
    assert source_session(db) == session
    assert hub.status().reconnects == 0
    assert recorder.items == []


def test_a_server_that_never_answers(dsn: str, proxy: Proxy, hub: Hub) -> None:
    """start gives up on a black hole after its timeout, and says so."""
    proxy.stall()
    with pytest.raises(pgsignals.ConnectError, match=r"does not answer|timeout expired"):
        hub.start(dsn, ["items"], listen_dsn=through(proxy, dsn), heartbeat_timeout=0.3)


def test_slow_networks_lose_nothing(
    hub: Hub, dsn: str, db: Database, proxy: Proxy, recorder: Recorder
) -> None:
    """Delay and a thin line make events late, not missing."""
    hub.subscribe(recorder, "items")
    hub.start(dsn, ["items"], listen_dsn=through(proxy, dsn))
    proxy.slow(delay=0.005, rate=100_000)
    for _ in range(5):
        db("INSERT INTO items SELECT FROM generate_series(1, 1000)")
    assert [event.id for event in recorder.wait(5000)] == list(range(1, 5001))


def test_whatever_breaks_every_loss_lies_in_a_gap(
    proxy_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through 20 random interruptions, numbers are missing inside announced Gaps only.

    Cuts, black holes longer than the heartbeat, terminated backends, restarts fast and immediate,
    while a writer commits numbered rows. At the end the same thread runs, with as many descriptors
    and threads as at the start.
    """
    monkeypatch.setattr(source, "Backoff", partial(Backoff, 0.05, 0.3))
    server = proxy_server
    dsn = server.create_database()
    with Proxy("127.0.0.1", server.port) as proxy, Hub() as hub:
        Database(dsn)("CREATE TABLE items (id bigserial PRIMARY KEY)")
        got: set[int] = set()
        gaps: list[Gap] = []
        back = threading.Semaphore(0)
        hub.subscribe(lambda event: got.add(event.id), "items")

        @hub.on_gap
        def note(gap: Gap) -> None:
            gaps.append(gap)
            back.release()

        lost = Recorder()
        hub.disconnected.connect(lambda hub, error: lost(error), weak=False)
        hub.start(dsn, ["items"], listen_dsn=through(proxy, dsn), **HEARTBEAT)
        thread = source_thread()
        writer = Writer(dsn)
        writer.start()
        writer.wrote(20)
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        faults = Faults(server, proxy, dsn, lost)
        chosen = random.Random(7).choices(faults.all, k=20)
        for number, fault in enumerate(chosen, 1):
            fault()
            assert back.acquire(timeout=DEADLINE), f"no Gap after fault {number}, {fault.__name__}"
            writer.wrote(5)
        writer.wrote(20)
        writer.stop()
        last = writer.rows[-1][0]
        eventually(lambda: last in got, bool)
        assert len(gaps) == 20
        missing = [
            (number, early, late) for number, early, late in writer.rows if number not in got
        ]
        for number, early, late in missing:
            assert any(gap.since <= late and early <= gap.until for gap in gaps), number
        assert missing, "no fault cost anything: the test proves nothing"
        assert source_thread() is thread
        assert thread.is_alive()
        eventually(threading.active_count, lambda count: count <= before[0])
        assert len(os.listdir("/proc/self/fd")) <= before[1]


@pytest.fixture
def proxy_server(each_version: int) -> Iterator[Server]:
    """A server that the test may stop."""
    with Server(each_version) as server:
        yield server


class Writer(threading.Thread):
    """Commits numbered rows, noting the server's time before and after each commit."""

    def __init__(self, dsn: str) -> None:
        super().__init__()
        self._dsn = dsn
        self._ending = threading.Event()
        self._changed = threading.Condition()
        self.rows: list[tuple[int, Any, Any]] = []

    def run(self) -> None:
        while not self._ending.is_set():
            try:
                connection = psycopg2.connect(self._dsn)
                connection.autocommit = True
                with connection.cursor() as cursor:
                    while not self._ending.wait(0.002):
                        cursor.execute(
                            "INSERT INTO items DEFAULT VALUES RETURNING id, clock_timestamp()"
                        )
                        [(number, early)] = cursor.fetchall()
                        cursor.execute("SELECT clock_timestamp()")
                        [(late,)] = cursor.fetchall()
                        with self._changed:
                            self.rows.append((number, early, late))
                            self._changed.notify_all()
                connection.close()
            except psycopg2.Error:
                self._ending.wait(0.01)

    def wrote(self, count: int) -> None:
        """Wait for so many more rows."""
        with self._changed:
            target = len(self.rows) + count
            assert self._changed.wait_for(lambda: len(self.rows) >= target, DEADLINE)

    def stop(self) -> None:
        """End, with the row under way."""
        self._ending.set()
        self.join(DEADLINE)


class Faults:
    """What is done to the connection."""

    def __init__(self, server: Server, proxy: Proxy, dsn: str, lost: Recorder) -> None:
        self._server = server
        self._proxy = proxy
        self._dsn = dsn
        self._lost = lost
        self.all: list[Callable[[], None]] = [
            self.cut,
            self.black_hole,
            self.terminate,
            self.restart_fast,
            self.restart_immediate,
        ]

    def cut(self) -> None:
        """Reset the connection."""
        self._proxy.cut()

    def black_hole(self) -> None:
        """Silence, longer than the heartbeat and its timeout: until the connection is given up."""
        losses = len(self._lost.items)
        self._proxy.stall()
        self._lost.wait(losses + 1)
        self._proxy.resume()

    def terminate(self) -> None:
        """Have the server end the session."""
        Database(self._dsn)(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'pgsignals'"
        )

    def restart_fast(self) -> None:
        """Restart the server, telling its clients."""
        self._server.restart("fast")

    def restart_immediate(self) -> None:
        """Restart the server as after a crash."""
        self._server.restart("immediate")
