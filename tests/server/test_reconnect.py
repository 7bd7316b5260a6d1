"""What happens to a listener whose connection is lost, or whose receivers are too slow."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from pgsignals import Gap, Hub, watch
from pgsignals.sources import notify
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.sources import source_thread
from tests.waiting import eventually

KILL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'pgsignals' AND datname = current_database()"
)


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")


def test_a_terminated_session_is_replaced(hub: Hub, each_dsn: str, each_db: Database) -> None:
    """The Gap covers what was missed, comes before what follows, and the thread is the same."""
    dsn, db = each_dsn, each_db
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")
    order = Recorder()
    hub.subscribe(order, "items")
    hub.on_gap(order)
    hub.disconnected.connect(lambda hub, error: order("disconnected"), weak=False)
    hub.start(dsn, ["items"])
    before = source_thread()
    db("INSERT INTO items (name) VALUES ('before')")
    order.wait(1)
    for _ in range(3):
        order.items.clear()
        # The session may still be alive for a moment, and deliver this one before it ends. Where
        # the server takes its time, the next session delivers it.
        [(missed, missed_at)] = db(
            f"{KILL}; INSERT INTO items (name) VALUES ('missed') RETURNING id, clock_timestamp()"
        )
        gap = order.wait_until(lambda item: isinstance(item, Gap))[-1]
        [(after,)] = db("INSERT INTO items (name) VALUES ('after') RETURNING id")
        items = order.wait_until(lambda item, after=after: getattr(item, "id", None) == after)
        seen = [getattr(item, "id", item) for item in items]
        assert [item for item in seen if item != missed] == ["disconnected", gap, after]
        assert seen.count(missed) <= 1
        assert gap.reason == "reconnected"
        if missed not in seen:
            assert gap.since <= missed_at <= gap.until + timedelta(seconds=1)
    assert source_thread() is before
    assert hub.status().reconnects == 3


@pytest.fixture
def own_server(each_version: int) -> Iterator[Server]:
    """A server that the test may stop."""
    with Server(each_version) as server:
        yield server


def test_a_restarted_server(hub: Hub, own_server: Server) -> None:
    """Through fast and immediate restarts the Hub comes back, with one Gap for each."""
    dsn = own_server.create_database()
    gaps, events = Recorder(), Recorder()
    db = Database(dsn)
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    db.connection.close()
    hub.on_gap(gaps)
    hub.subscribe(events, "items")
    hub.start(dsn, ["items"])
    for number, mode in enumerate(("fast", "immediate"), 1):
        own_server.restart(mode)
        gaps.wait(number)
        db = Database(dsn)
        db("INSERT INTO items DEFAULT VALUES")
        db.connection.close()
        events.wait(number)
    assert len(gaps.items) == 2


def test_what_was_removed_meanwhile_is_installed_again(
    hub: Hub, dsn: str, db: Database, recorder: Recorder
) -> None:
    """A listener that was away when somebody removed its triggers puts them back."""
    hub.start(dsn, ["items"])
    hub.on_gap(recorder)
    [(name,)] = db("SELECT tgname FROM pg_trigger WHERE tgname LIKE 'pgsignals%' LIMIT 1")
    db(f'DROP TRIGGER "{name}" ON items')
    db(KILL)
    recorder.wait(1)
    assert {state.status for state in hub.status().watchers} == {"INSTALLED"}


def test_a_table_that_changed_meanwhile(
    hub: Hub, dsn: str, db: Database, recorder: Recorder
) -> None:
    """A listener whose watched column is gone when it comes back still delivers the rest."""
    hub.start(dsn, [("items", "inserted"), watch("items", "updated", extra=["name"])])
    gaps = Recorder()
    hub.subscribe(recorder, "items", "inserted")
    hub.on_gap(gaps)
    db("ALTER TABLE items DROP COLUMN name")
    db(KILL)
    gaps.wait_until(lambda gap: gap.reason == "reconnected")
    db("INSERT INTO items DEFAULT VALUES")
    assert recorder.wait(1)[0].id == 1
    assert gaps.wait_until(lambda gap: gap.reason == "watcher_broken")[-1].detail.startswith(
        "public.items has no column 'name'"
    )


def test_events_that_wait_survive_a_reconnection(
    hub: Hub, dsn: str, db: Database, recorder: Recorder
) -> None:
    """What was queued when the connection was lost is delivered after it came back."""
    gate, entered, gaps = threading.Event(), threading.Event(), Recorder()

    @hub.on("items")
    def slow(event: Any) -> None:
        entered.set()
        gate.wait(DEADLINE)
        recorder(event)

    hub.start(dsn, ["items"])
    hub.on_gap(gaps)
    for _ in range(5):
        db("INSERT INTO items (name) VALUES ('a')")
    assert entered.wait(DEADLINE)
    eventually(lambda: hub.status().received, lambda count: count == 5)
    db(KILL)
    eventually(lambda: hub.status().reconnects, lambda count: count == 1)
    gate.set()
    assert [event.id for event in recorder.wait(5)] == [1, 2, 3, 4, 5]
    gaps.wait(1)


def test_events_are_shed_when_receivers_are_too_slow(
    hub: Hub, dsn: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the queue and the pause, events are dropped, and one Gap covers all of them."""
    monkeypatch.setattr(notify, "PAUSE_SECONDS", 0.05)
    gate, entered = threading.Event(), threading.Event()
    seen: list[Any] = []
    order = Recorder()

    @hub.on("items")
    def slow(event: Any) -> None:
        entered.set()
        gate.wait(DEADLINE)
        seen.append(event)
        order(event)

    hub.on_gap(order)
    hub.start(dsn, ["items"], queue_size=10)
    db("INSERT INTO items (name) SELECT 'first' FROM generate_series(1, 10)")
    assert entered.wait(DEADLINE)
    for _ in range(20):
        db("INSERT INTO items (name) VALUES ('more')")
    eventually(lambda: hub.status().shed, lambda count: count == 20)
    gate.set()
    gap = order.wait_until(lambda item: isinstance(item, Gap))[-1]
    db("INSERT INTO items (name) VALUES ('last')")
    order.wait_until(lambda item: getattr(item, "id", None) == 31)
    assert [e.id for e in seen] == [*range(1, 11), 31]
    assert gap.reason == "overflow"
    assert gap.since <= gap.until
    assert sum(isinstance(item, Gap) for item in order.items) == 1


def test_reading_pauses_for_a_while(hub: Hub, dsn: str, db: Database) -> None:
    """A queue that is full for less than the pause loses nothing."""
    order = Recorder()
    hub.subscribe(order, "items")
    hub.on_gap(order)
    hub.start(dsn, ["items"], queue_size=10)
    for _ in range(30):
        db("INSERT INTO items (name) SELECT 'a' FROM generate_series(1, 10)")
    assert [event.id for event in order.wait(300)] == list(range(1, 301))
    assert hub.status().shed == 0


def test_stop_while_the_server_is_away(hub: Hub, own_server: Server) -> None:
    """stop ends a Hub that is trying to connect, at once and without a trace."""
    dsn = own_server.create_database()
    db = Database(dsn)
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    db.connection.close()
    lost = threading.Event()
    hub.disconnected.connect(lambda hub, error: lost.set(), weak=False)
    hub.start(dsn, ["items"])
    own_server.stop("immediate")
    assert lost.wait(DEADLINE)
    assert hub.stop()
    assert not [t for t in threading.enumerate() if t.name.startswith("pgsignals-")]


def test_an_idle_listener_holds_no_transaction(hub: Hub, each_dsn: str, each_db: Database) -> None:
    """The listening session is idle, not idle in transaction, so that it holds up no cleanup."""
    each_db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    hub.start(each_dsn, ["items"])

    def states() -> list[tuple[str, object]]:
        found = each_db(
            "SELECT state, backend_xmin FROM pg_stat_activity WHERE application_name = 'pgsignals'"
            " AND datname = current_database()"
        )
        return [(state, xmin) for state, xmin in found]

    # The session that installed goes a little after its client has.
    assert eventually(states, lambda found: len(found) == 1) == [("idle", None)]


def test_heartbeats_that_are_answered_late(
    hub: Hub, each_dsn: str, each_db: Database, recorder: Recorder
) -> None:
    """A server that takes longer to answer than the next heartbeat is far is no lost connection."""
    each_db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    hub.subscribe(recorder, "items")
    hub.on_gap(recorder)
    hub.start(each_dsn, ["items"], heartbeat=0.001)
    for number in range(1, 21):
        each_db("INSERT INTO items DEFAULT VALUES")
        assert recorder.wait(number)[-1].id == number
    assert hub.status().reconnects == 0


def test_many_descriptors(dsn: str, db: Database, recorder: Recorder) -> None:
    """With more than 1,024 descriptors open, where select() itself fails, everything works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(2000)]
    try:
        with Hub().start(dsn, ["items"]) as hub:
            hub.subscribe(recorder, "items")
            db("INSERT INTO items (name) VALUES ('a')")
            recorder.wait(1)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
