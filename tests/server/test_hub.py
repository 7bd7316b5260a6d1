"""The life of a Hub: start, stop, restart, two at once, exit, signals of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import pytest

import pgsignals
from pgsignals import Hub
from tests.conftest import DEADLINE, Database, Recorder


@pytest.fixture
def items(db: Database) -> str:
    """A table with a name and an owner."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text, owner_id int)")
    return "items"


def test_importing_starts_nothing() -> None:
    """Importing pgsignals starts no thread, opens no socket and loads no framework."""
    script = """
        import sys, threading
        import pgsignals
        assert threading.active_count() == 1
        loaded = {"sqlalchemy", "django", "flask", "rich", "click"} & set(sys.modules)
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_start_returns_when_events_are_received(dsn: str, db: Database, items: str) -> None:
    """A change made right after start arrives."""
    seen = Recorder()
    with Hub().start(dsn, [items]) as hub:
        hub.subscribe(seen, items)
        db("INSERT INTO items (name) VALUES ('a')")
        [event] = seen.wait(1)
    assert (event.op, event.id) == ("inserted", 1)


def test_receivers_may_come_before_start(
    hub: Hub, dsn: str, db: Database, items: str, recorder: Recorder
) -> None:
    """A receiver that was registered before start gets events."""
    hub.on(items, "inserted")(recorder)
    hub.start(dsn, [items])
    db("INSERT INTO items (name) VALUES ('a')")
    assert recorder.wait(1)[0].model == "items"


def test_starting_twice_says_so(hub: Hub, dsn: str, items: str) -> None:
    """A Hub that runs refuses to start, and goes on running."""
    hub.start(dsn, [items])
    with pytest.raises(pgsignals.StateError, match=r"running already.*stop"):
        hub.start(dsn, [items])
    assert hub.running


def test_it_starts_again_after_stop(
    hub: Hub, dsn: str, db: Database, items: str, recorder: Recorder
) -> None:
    """Receivers stay registered over stop and start."""
    hub.subscribe(recorder, items)
    for number in (1, 2):
        hub.start(dsn, [items])
        db("INSERT INTO items (name) VALUES ('a')")
        assert len(recorder.wait(number)) == number
        assert hub.stop()


def test_stop_is_safe_at_any_time(hub: Hub, dsn: str, items: str) -> None:
    """Stopping a Hub that never started, or twice, does nothing."""
    assert hub.stop()
    hub.start(dsn, [items])
    assert hub.stop()
    assert hub.stop()
    assert not hub.running


def test_stop_handles_what_has_arrived(hub: Hub, dsn: str, db: Database, items: str) -> None:
    """Events that are queued when stop is called are still delivered."""
    seen: list[Any] = []
    first, go = threading.Event(), threading.Event()

    def slow(event: Any) -> None:
        first.set()
        go.wait(DEADLINE)
        seen.append(event.id)

    hub.subscribe(slow, items)
    hub.start(dsn, [items])
    db("INSERT INTO items (name) SELECT 'a' FROM generate_series(1, 100)")
    assert first.wait(DEADLINE)
    stopping = threading.Thread(target=hub.stop)
    stopping.start()
    go.set()
    stopping.join(DEADLINE)
    assert seen == list(range(1, 101))


def test_stop_handles_what_was_read_while_the_queue_was_full(
    hub: Hub, dsn: str, db: Database, items: str
) -> None:
    """Notifications that the source has read, and has no room for yet, are delivered too."""
    seen: list[Any] = []
    first, go = threading.Event(), threading.Event()

    def slow(event: Any) -> None:
        first.set()
        go.wait(DEADLINE)
        seen.append(event.id)

    hub.subscribe(slow, items)
    hub.start(dsn, [items], queue_size=1)
    with db.connection.cursor() as cursor:
        # One round trip, so that they are in the source's hands together.
        cursor.execute("BEGIN; " + "INSERT INTO items (name) VALUES ('a'); " * 5 + "COMMIT")
    assert first.wait(DEADLINE)
    stopped: list[bool] = []
    stopping = threading.Thread(target=lambda: stopped.append(hub.stop(DEADLINE)))
    stopping.start()
    source = next(t for t in threading.enumerate() if t.name == "pgsignals-source")
    source.join(DEADLINE)
    go.set()
    stopping.join(DEADLINE)
    assert stopped == [True]
    assert seen == [1, 2, 3, 4, 5]


def test_stop_gives_up_on_a_stuck_receiver(hub: Hub, dsn: str, db: Database, items: str) -> None:
    """A receiver that blocks for ever costs stop its timeout, and no other is called after it."""
    stuck, release = threading.Event(), threading.Event()
    calls: list[int] = []

    def block(event: Any) -> None:
        calls.append(event.id)
        stuck.set()
        release.wait(DEADLINE)

    hub.subscribe(block, items)
    hub.start(dsn, [items])
    db("INSERT INTO items (name) VALUES ('a'), ('b')")
    assert stuck.wait(DEADLINE)
    assert not hub.stop(timeout=0.1)
    release.set()
    assert calls == [1]


def test_a_receiver_may_stop_the_hub(hub: Hub, dsn: str, db: Database, items: str) -> None:
    """stop() called by a receiver returns, and that receiver is the last that is called."""
    calls: list[int] = []

    @hub.on(items)
    def last(event: Any) -> None:
        calls.append(event.id)
        hub.stop()

    hub.start(dsn, [items])
    db("INSERT INTO items (name) VALUES ('a'), ('b')")
    assert hub.wait(DEADLINE)
    assert calls == [1]


def test_two_hubs_have_their_own_receivers(
    connect: Callable[[str], Database], server: Any, items: str, dsn: str, db: Database
) -> None:
    """A second Hub listens to a second database, and neither hears the other's events."""
    other_dsn = server.create_database()
    other = connect(other_dsn)
    other("CREATE TABLE items (id bigserial PRIMARY KEY, name text)")
    here, there = Recorder(), Recorder()
    with Hub().start(dsn, [items]) as first, Hub().start(other_dsn, [items]) as second:
        first.subscribe(here, items)
        second.subscribe(there, items)
        db("INSERT INTO items (id, name) VALUES (10, 'a')")
        other("INSERT INTO items (id, name) VALUES (20, 'b')")
        assert [e.id for e in here.wait(1)] == [10]
        assert [e.id for e in there.wait(1)] == [20]


def test_connected_is_sent_at_start(hub: Hub, dsn: str, items: str) -> None:
    """Receivers of the connected signal learn when events can arrive."""
    ready = threading.Event()

    @hub.connected.connect
    def note(sender: Hub) -> None:
        assert sender is hub
        ready.set()

    hub.start(dsn, [items])
    assert ready.wait(DEADLINE)


def test_a_failing_receiver_stops_nobody(
    hub: Hub,
    dsn: str,
    db: Database,
    items: str,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a receiver raises is logged with its name and the event's uid, and signalled."""
    failures: list[dict[str, Any]] = []

    @hub.on(items)
    def broken(event: Any) -> None:
        raise SystemExit("no")

    @hub.receiver_failed.connect
    def note(sender: Hub, **details: Any) -> None:
        failures.append(details)
        raise ValueError("this one fails too")

    hub.subscribe(recorder, items)
    hub.start(dsn, [items])
    db("INSERT INTO items (name) VALUES ('a'), ('b')")
    first, _ = recorder.wait(2)
    hub.stop()
    assert [f["event"].id for f in failures] == [1, 2]
    assert failures[0]["receiver"] is broken
    assert isinstance(failures[0]["error"], SystemExit)
    assert "broken raised SystemExit" in caplog.text
    assert first.uid in caplog.text


def test_wait_for_returns_the_event(hub: Hub, dsn: str, db: Database, items: str) -> None:
    """wait_for gives the next event that fits, and others are passed over."""
    db("INSERT INTO items (owner_id) VALUES (6), (7)")
    hub.start(dsn, [pgsignals.watch(items, extra=["owner_id"])])
    done = threading.Event()

    def write() -> None:
        while not done.wait(0.01):
            db("UPDATE items SET name = name")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert hub.wait_for(items, "updated", owner_id=7, timeout=DEADLINE).id == 2
    finally:
        done.set()
        writer.join()


def test_wait_for_gives_up(hub: Hub, dsn: str, items: str) -> None:
    """WaitTimeout names what did not come."""
    hub.start(dsn, [items])
    with pytest.raises(pgsignals.WaitTimeout, match=r"items, 'updated', id=1\) within 0.01 s"):
        hub.wait_for(items, "updated", id=1, timeout=0.01)


def test_status_needs_a_running_hub(hub: Hub) -> None:
    """status() of a stopped Hub says what to do."""
    with pytest.raises(pgsignals.StateError, match="start"):
        hub.status()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"install": "maybe"}, "install='maybe'.*'auto', 'check', 'off'"),
        ({"workers": 0}, "workers=0.*from 1"),
        ({"workers": 0, "delivery": "outbox"}, "workers=0.*backends alone"),
        ({"queue_size": "many"}, "queue_size='many'"),
        ({"namespace": ""}, "namespace=''"),
        ({"delivery": "magic"}, "delivery='magic'.*'notify'"),
    ],
)
def test_options_are_checked(
    hub: Hub, dsn: str, items: str, options: dict[str, Any], message: str
) -> None:
    """An option that cannot be is refused with what it may be."""
    with pytest.raises(pgsignals.ConfigurationError, match=message):
        hub.start(dsn, [items], **options)


def test_no_watchers_is_an_error(hub: Hub, dsn: str) -> None:
    """Starting with nothing to watch is a mistake."""
    with pytest.raises(pgsignals.ConfigurationError, match="nothing to watch"):
        hub.start(dsn, [])


def test_the_first_connection_fails_at_once(hub: Hub) -> None:
    """start raises when there is no server, and leaves no thread behind."""
    before = threading.active_count()
    with pytest.raises(pgsignals.ConnectError, match="Cannot connect") as caught:
        hub.start("postgresql://me:hunter2@127.0.0.1:1/nowhere", ["items"])
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value.__cause__)
    assert threading.active_count() == before
    assert not hub.running


def test_a_script_ends_by_itself(dsn: str, items: str) -> None:
    """A program that starts a Hub and reaches its end exits, having handled what arrived."""
    script = f"""
        import psycopg2, pgsignals, threading
        seen = threading.Event()
        pgsignals.start({dsn!r}, ["items"])
        @pgsignals.on("items")
        def show(event):
            print(event.op, event.id, flush=True)
            seen.set()
        c = psycopg2.connect({dsn!r}); c.autocommit = True
        c.cursor().execute("INSERT INTO items (name) VALUES ('a')")
        assert seen.wait({DEADLINE})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    assert done.stdout == "inserted 1\n"
    assert done.stderr == ""


def test_nothing_is_left_after_stop(dsn: str, db: Database, items: str) -> None:
    """Threads, descriptors and the session are gone after stop."""
    threads = threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Hub().start(dsn, [items], workers=3):
            pass
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
