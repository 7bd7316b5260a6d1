"""Backfills of tables that change or are locked, and of receivers that fail, are slow or absent."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from contextlib import closing

import psycopg2
import pytest

import pgsignals
from pgsignals import Backfill, Hub
from pgsignals.consumers import dead_letters
from pgsignals.consumers.backfills import runner
from pgsignals.outbox import administration
from pgsignals.outbox.housekeeping import tidy
from tests.backfills import ask, rows
from tests.backfills import users as users
from tests.conftest import DEADLINE, Database, Recorder
from tests.grants import documented_grants
from tests.waiting import eventually, settle


def test_cancel(dsn: str, hub: Hub) -> None:
    """A cancelled backfill ends where it is, and the next one is not held up by it."""
    entered, leave = threading.Event(), threading.Event()
    seen: list[int] = []

    @hub.on("users", "snapshot")
    def receive(event: pgsignals.Event) -> None:
        seen.append(event.id)
        entered.set()
        assert leave.wait(DEADLINE)

    hub.start(dsn, ["users"], delivery="outbox", name="mailer", queue_size=10)
    backfill = hub.backfill("users", chunk=1)
    assert entered.wait(DEADLINE)
    assert backfill.cancel()
    assert not backfill.cancel()
    assert not backfill.wait(DEADLINE)
    leave.set()
    assert backfill.state == "cancelled"
    second = hub.backfill("users", where="id = 500")
    assert second.wait(DEADLINE)
    assert seen[-1] == 500
    assert len(seen) < 500


def test_a_failing_receiver(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """What it cannot take becomes a dead letter with the row in it; other rows are delivered."""
    broken = threading.Event()
    broken.set()

    @hub.on("users", "snapshot", retries=1, backoff=0.01)
    def receive(event: pgsignals.Event) -> None:
        if event.id == 77 and broken.is_set():
            raise ValueError("poison")
        recorder(event)

    watcher = pgsignals.watch("users", extra=["name"])
    hub.start(dsn, [watcher], delivery="outbox", name="mailer")
    assert hub.backfill("users", chunk=50).wait(DEADLINE)
    assert [e.id for e in recorder.wait(499)] == [n for n in range(1, 501) if n != 77]
    [(uid, payload)] = db("SELECT uid, payload FROM pgsignals.dead_letters")
    assert "user 77" in payload
    broken.clear()
    with db.connection.cursor() as cursor:
        assert dead_letters.retry(cursor, None) == 1
    letter = recorder.wait(500)[-1]
    assert (letter.uid, letter.id, letter.values) == (uid, 77, {"name": "user 77"})
    assert letter.redelivered


@pytest.mark.parametrize(
    "change",
    ["DROP TABLE users", "ALTER TABLE users RENAME TO people", "ALTER TABLE users DROP name"],
)
def test_a_table_that_changes_meanwhile(
    dsn: str, db: Database, hub: Hub, recorder: Recorder, change: str
) -> None:
    """The backfill fails with PostgreSQL's reason, and other events go on."""
    db("CREATE TABLE orders (id serial PRIMARY KEY)")
    entered, leave = threading.Event(), threading.Event()

    @hub.on("users", "snapshot")
    def receive(event: pgsignals.Event) -> None:
        entered.set()
        assert leave.wait(DEADLINE)

    hub.on("orders")(recorder)
    watchers = [pgsignals.watch("users", extra=["name"]), "orders"]
    hub.start(dsn, watchers, delivery="outbox", name="mailer", queue_size=5)
    backfill = hub.backfill("users", chunk=3)
    assert entered.wait(DEADLINE)
    db(change)
    leave.set()
    with pytest.raises(pgsignals.DatabaseError, match="does not exist"):
        backfill.wait(DEADLINE)
    assert backfill.state == "failed"
    db("INSERT INTO orders DEFAULT VALUES")
    recorder.wait(1)


def test_a_table_that_is_made_anew_meanwhile(dsn: str, db: Database, hub: Hub) -> None:
    """The backfill fails: the key that it had come to says nothing of the new one's rows."""
    entered, leave = threading.Event(), threading.Event()

    @hub.on("users", "snapshot")
    def receive(event: pgsignals.Event) -> None:
        entered.set()
        assert leave.wait(DEADLINE)

    watchers = [pgsignals.watch("users", extra=["name"])]
    hub.start(dsn, watchers, delivery="outbox", name="mailer", queue_size=5)
    backfill = hub.backfill("users", chunk=3)
    assert entered.wait(DEADLINE)
    db(
        "BEGIN; ALTER TABLE users RENAME TO former;"
        " CREATE TABLE users (LIKE former INCLUDING ALL);"
        " INSERT INTO users SELECT id, 'new ' || id FROM former; COMMIT"
    )
    leave.set()
    with pytest.raises(pgsignals.DatabaseError, match="made anew meanwhile"):
        backfill.wait(DEADLINE)
    assert backfill.state == "failed"


def test_a_table_that_is_locked(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """Other events do not wait for its lock; behind that, its rows come as they are then."""
    db("CREATE TABLE orders (id serial PRIMARY KEY)")
    snapshots = Recorder()
    hub.on("users", "snapshot")(snapshots)
    hub.on("orders")(recorder)
    watchers = [pgsignals.watch("users", extra=["name"]), "orders"]
    hub.start(dsn, watchers, delivery="outbox", name="mailer", lease=1.0)
    with closing(psycopg2.connect(dsn)) as other, other.cursor() as cursor:
        # Rewritten, behind which a snapshot from before would see no rows.
        cursor.execute("ALTER TABLE users ALTER name TYPE text USING upper(name)")
        db(
            "WITH asked AS (INSERT INTO pgsignals.backfills"
            " (consumer, schema_name, table_name, table_oid, search_path, chunk, total)"
            " VALUES ('mailer', 'public', 'users', 'users'::regclass, '', 100, 500)"
            " RETURNING id)"
            " INSERT INTO pgsignals.backfill_parts (backfill, part) SELECT id, 0 FROM asked"
        )
        db("NOTIFY pgsignals_wake, 'backfill'")
        for number in range(5):
            db("INSERT INTO orders DEFAULT VALUES")
            recorder.wait(number + 1)
        assert not snapshots.items
        other.commit()
    # Some come twice where a busy machine has cost the lease.
    eventually(
        lambda: {event.values["name"] for event in [*snapshots.items]},
        lambda found: found == {f"USER {n}" for n in range(1, 501)},
    )


def test_a_role_of_its_own(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """The grants that the documentation lists, and SELECT on the table, are all that is needed."""
    hub.on("users", "snapshot")(recorder)
    watchers = [pgsignals.watch("users", extra=["name"])]
    hub.start(dsn, watchers, delivery="outbox", name="mailer")
    hub.stop()
    role = f"consumer_{uuid.uuid4().hex[:8]}"
    db(f"CREATE ROLE {role} LOGIN")
    try:
        for grant in documented_grants("consumer"):
            db(f"GRANT {grant} TO {role}")
        own = dsn.replace("postgres@", f"{role}@")
        hub.start(own, watchers, delivery="outbox", name="mailer", install="check")
        with pytest.raises(pgsignals.PrivilegeError, match="GRANT it SELECT"):
            hub.backfill("users")
        unread = Backfill(dsn, ask(db, "mailer", "users"))
        with pytest.raises(pgsignals.DatabaseError, match="permission denied"):
            unread.wait(DEADLINE)
        db(f"GRANT SELECT ON users TO {role}")
        assert hub.backfill("users", where="id < 10").wait(DEADLINE)
        assert len(recorder.items) == 9
        # Read only: a condition writes nothing.
        db(
            "CREATE FUNCTION meddle() RETURNS bool LANGUAGE sql AS"
            " $$ UPDATE users SET name = 'x' RETURNING true $$"
        )
        db(f"GRANT UPDATE ON users TO {role}")
        with pytest.raises(pgsignals.DatabaseError, match="read-only transaction"):
            hub.backfill("users", where="meddle()").wait(DEADLINE)
    finally:
        hub.stop()
        db(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_backfill_that_nobody_hears_yet(
    dsn: str, db: Database, hub: Hub, recorder: Recorder
) -> None:
    """It waits for a receiver, says so, holds up no other one, and then is delivered."""
    db("CREATE TABLE orders (id int PRIMARY KEY); INSERT INTO orders VALUES (1)")
    orders = Recorder()
    hub.on("orders")(orders)
    hub.start(dsn, ["users", "orders"], delivery="outbox", name="mailer")
    first = Backfill(dsn, ask(db, "mailer", "users"))
    assert hub.backfill("orders").wait(DEADLINE)
    assert [event.op for event in orders.items] == ["snapshot"]
    assert first.status.error == "it waits for a receiver of its snapshots"
    hub.on("users", "snapshot")(recorder)
    assert first.wait(DEADLINE)
    assert len(recorder.items) == 500
    assert first.status.error is None
    other = pgsignals.Hub()
    with other.start(dsn, ["orders"], delivery="outbox", name="clerk"):
        unknown = Backfill(dsn, ask(db, "clerk", "users"))
        last = Backfill(dsn, ask(db, "clerk", "orders"))
        orders_again = Recorder()
        other.on("orders")(orders_again)
        assert last.wait(DEADLINE)
        assert unknown.status.error == "it waits for a process with a watcher for it"
        assert unknown.cancel()


def test_settled(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """What is committed is settled beside a backfill too, though its windows end elsewhere."""
    hub.on("users")(recorder)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    with closing(psycopg2.connect(dsn)) as long, long.cursor() as cursor:
        cursor.execute("INSERT INTO users VALUES (7777, 'slow')")
        backfill = hub.backfill("users", chunk=1)
        for number in range(10):
            db("UPDATE users SET name = %s WHERE id = 1", (str(number),))
            settle(hub, 10)
            names = [e.values for e in recorder.items if e.op == "updated"]
            assert len(names) == number + 1
        long.rollback()
    assert backfill.wait(DEADLINE)


def test_memory(dsn: str, db: Database, hub: Hub, until_polled: Callable[[], None]) -> None:
    """However slow receivers are, it reads no further than it may."""
    rows(db, 300_000, 501)
    going, held = threading.Event(), threading.Event()

    @hub.on("users", "snapshot")
    def receive(event: pgsignals.Event) -> None:
        going.set()
        held.wait(DEADLINE)

    hub.start(dsn, ["users"], delivery="outbox", name="mailer", queue_size=1000)
    backfill = hub.backfill("users")
    try:
        assert going.wait(DEADLINE)

        def read() -> tuple[int, int]:
            before = hub.status().unacknowledged
            until_polled()
            return before, hub.status().unacknowledged

        _, now = eventually(read, lambda found: 0 < found[0] == found[1])
        # The queue, and the chunk that goes past it.
        assert now <= 3000
    finally:
        backfill.cancel()
        held.set()
        hub.stop(0.1)


def test_rows_that_are_slow_to_read(
    dsn: str, db: Database, hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks shrink until they are read in time; a row that takes too long by itself is the end."""
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.01)
    hub.on("users")(recorder)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer", lease=1.0)
    slow = "pg_sleep(0.02) IS NOT NULL"
    assert hub.backfill("users", where=f"id > 30 OR {slow}").wait(DEADLINE)
    assert [event.id for event in recorder.items] == list(range(1, 501))
    stuck = hub.backfill("users", where="id <> 3 OR pg_sleep(60) IS NOT NULL")
    db("INSERT INTO users VALUES (1000, 'meanwhile')")
    with pytest.raises(pgsignals.DatabaseError, match="statement timeout"):
        stuck.wait(DEADLINE)
    settle(hub, 15)
    assert recorder.items[-1].id == 1000 or recorder.items[500].id == 1000
    assert stuck.done <= 2


def test_what_is_forgotten(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """Ended ones after the retention, and all of a consumer with it."""
    hub.on("users")(recorder)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    ended = hub.backfill("users", where="id < 3")
    assert ended.wait(DEADLINE)
    hub.stop()
    running = Backfill(dsn, ask(db, "mailer", "users"))
    with db.connection.cursor() as cursor:
        tidy(cursor)
        assert ended.state == "done"
        db("UPDATE pgsignals.settings SET retention_seconds = 0")
        tidy(cursor)
        assert running.state == "running"
        with pytest.raises(pgsignals.DatabaseError, match="no backfill 1"):
            ended.wait(1)
        administration.drop_consumer(cursor, "mailer")
    assert db("SELECT * FROM pgsignals.backfills") == []
    assert db("SELECT * FROM pgsignals.backfill_parts") == []
