"""A consumer of the write-ahead log whose slot is lost, moved, taken, or in the way."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import pgsignals
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually, settle
from tests.wal import (
    check_deliveries,
    end_readers,
    gaps,
    slots,
    start,
    strike,
    until_heard,
    until_saved,
)


@pytest.fixture
def shop(each_dsn: str, connect: Callable[[str], Database]) -> Database:
    """A database with a table."""
    db = connect(each_dsn)
    db("CREATE TABLE items (id bigint PRIMARY KEY, n int NOT NULL DEFAULT 0)")
    return db


@contextmanager
def server_of_its_own(version: int, **settings: str) -> Iterator[Server]:
    """A server whose log can be read, to be stopped and set up as one wants."""
    given = {
        "wal_level": "logical",
        "max_slot_wal_keep_size": "1GB",
        "shared_buffers": "16MB",
        **settings,
    }
    with Server(version, given) as server:
        yield server


def is_item(number: int) -> Callable[[Any], bool]:
    """Whether something that came is an event of that item."""
    return lambda each: getattr(each, "id", None) == number


def until_read(db: Database) -> None:
    """Wait until somebody reads from the only slot."""
    eventually(lambda: slots(db, "active"), lambda found: found == [True])


LOSSES = {
    "dropped": "SELECT pg_drop_replication_slot(%(slot)s)",
    "moved": "SELECT pg_replication_slot_advance(%(slot)s, pg_current_wal_lsn())",
    "made anew": "SELECT pg_drop_replication_slot(%(slot)s);"
    "SELECT pg_create_logical_replication_slot(%(slot)s, 'pgoutput')",
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_slot_lost_while_it_is_down(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, loss: str
) -> None:
    """What was committed before is announced by a Gap, and events go on."""
    hub.on("items", "inserted")(recorder)
    hub.on_gap(recorder)
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (1)")
    settle(hub)
    assert hub.stop()
    shop("INSERT INTO items VALUES (2)")
    [(lost_at,)] = shop("SELECT clock_timestamp()")
    strike(shop, LOSSES[loss])
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (3)")
    found = recorder.wait_until(is_item(3))
    [gap] = gaps(found)
    assert gap.since < lost_at < gap.until
    assert "replication slot" in gap.detail
    assert [each.id for each in found if each is not gap] == [1, 3]
    assert slots(shop, "active") == [True]
    # It is announced once.
    settle(hub)
    assert hub.stop()
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (4)")
    assert len(gaps(recorder.wait_until(is_item(4)))) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_slot_lost_while_it_runs(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, loss: str
) -> None:
    """The running consumer notices, announces a Gap where it missed something, and goes on."""
    hub.on("items", "inserted")(recorder)
    hub.on_gap(recorder)
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    begun = threading.Event()
    ending = threading.Event()
    # Each with a time before and one after its commit.
    committed: dict[int, tuple[Any, Any]] = {}

    def write() -> None:
        with closing(psycopg2.connect(shop.dsn)) as connection, connection.cursor() as cursor:
            number = 1
            while not ending.is_set():
                number += 1
                cursor.execute(
                    "INSERT INTO items VALUES (%s) RETURNING clock_timestamp()", (number,)
                )
                [(at,)] = cursor.fetchall()
                connection.commit()
                cursor.execute("SELECT clock_timestamp()")
                [(done,)] = cursor.fetchall()
                connection.commit()
                committed[number] = at, done
                begun.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert begun.wait(DEADLINE)
        strike(shop, LOSSES[loss])
        before = len(recorder.items)
        eventually(lambda: len(recorder.items), lambda count: count > before + 10)
    finally:
        ending.set()
        writer.join(DEADLINE)
    shop("INSERT INTO items VALUES (0)")
    found = recorder.wait_until(is_item(0))
    announced = gaps(found)
    delivered = {each.id for each in found if not isinstance(each, pgsignals.Gap)}
    for number in committed.keys() - delivered:
        at, done = committed[number]
        assert any(gap.since <= done and at <= gap.until for gap in announced), (
            number,
            committed[number],
            announced,
        )
    assert loss == "moved" or announced


def test_a_slot_moved_over_nothing(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A slot that is moved to where its consumer has come to anyway is no loss."""
    hub.on("items", "inserted")(recorder)
    hub.on_gap(recorder)
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    until_saved(shop)
    assert hub.stop()
    strike(
        shop,
        "SELECT pg_replication_slot_advance(%(slot)s,"
        " (SELECT '0/0'::pg_lsn + lsn FROM pgsignals.consumers))",
    )
    shop("INSERT INTO items VALUES (2)")
    start(hub, shop.dsn)
    assert [each.id for each in recorder.wait(2)] == [1, 2]


@pytest.mark.parametrize(
    "how",
    [
        "logical_replication_slot(%(slot)s, 'pgoutput', false, true)",
        "physical_replication_slot(%(slot)s)",
    ],
)
def test_a_slot_of_another_kind(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, how: str
) -> None:
    """A slot that somebody has made for another use is refused by name, until it is dropped."""
    hub.on("items", "inserted")(recorder)
    hub.on_gap(recorder)
    start(hub, shop.dsn)
    until_saved(shop)
    assert hub.stop()
    [slot] = slots(shop)
    strike(
        shop,
        f"SELECT pg_drop_replication_slot(%(slot)s);SELECT pg_create_{how}",
    )
    shop("INSERT INTO items VALUES (1)")
    with pytest.raises(pgsignals.DatabaseError, match=slot):
        start(hub, shop.dsn)
    shop("SELECT pg_drop_replication_slot(%s)", (slot,))
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (2)")
    found = recorder.wait_until(is_item(2))
    assert len(gaps(found)) == 1


def test_a_slot_that_the_server_gives_up(
    hub: pgsignals.Hub,
    each_version: int,
    connect: Callable[[str], Database],
    recorder: Recorder,
) -> None:
    """Beyond max_slot_wal_keep_size the log is gone: a Gap says so, and events go on."""
    settings = {"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "64MB"}
    with server_of_its_own(each_version, **settings) as server:
        db = connect(server.create_database())
        db("CREATE TABLE items (id bigint PRIMARY KEY)")
        hub.on("items", "inserted")(recorder)
        hub.on_gap(recorder)
        start(hub, db.dsn)
        db("INSERT INTO items VALUES (1)")
        settle(hub)
        assert hub.stop()
        db("INSERT INTO items VALUES (2)")
        for _ in range(6):
            db("SELECT pg_switch_wal()")
            db("CREATE TABLE IF NOT EXISTS ballast (); CHECKPOINT")
            db("DROP TABLE ballast; CHECKPOINT")
        assert slots(db, "wal_status") == ["lost"]
        start(hub, db.dsn)
        db("INSERT INTO items VALUES (3)")
        found = recorder.wait_until(is_item(3))
        [gap] = gaps(found)
        assert "given up" in gap.detail
        assert slots(db, "wal_status", "active") == [("reserved", True)]
        hub.stop()


def test_a_forgotten_transaction(hub: pgsignals.Hub, shop: Database) -> None:
    """A slot waits for what is being written anywhere: start() ends, and names who is in the way.

    When that has ended, it starts; nothing was left behind.
    """
    with closing(psycopg2.connect(shop.dsn, application_name="forgotten")) as connection:
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE others ()")
            [pid] = [connection.info.backend_pid]
        for name in ("mailer", None):
            began = time.monotonic()
            with pytest.raises(pgsignals.DatabaseError, match=rf"process {pid} .*forgotten"):
                start(hub, shop.dsn, name=name, heartbeat_timeout=2.0)
            assert time.monotonic() - began < 10.0
        eventually(lambda: slots(shop), lambda found: found == [])
        connection.rollback()
    start(hub, shop.dsn)
    assert slots(shop, "active") == [True]


def test_several_make_the_slot_at_once(shop: Database, recorder: Recorder) -> None:
    """Processes of one name that start together make one slot, and none of them fails."""
    hubs = [pgsignals.Hub() for _ in range(4)]
    failed = Recorder()

    def begin(hub: pgsignals.Hub) -> None:
        try:
            start(hub, shop.dsn)
        except Exception as error:
            failed(error)

    start(hubs[0], shop.dsn)
    hubs[0].stop()
    shop("DELETE FROM pgsignals.consumers")
    strike(shop, LOSSES["dropped"])
    try:
        # Whoever is the first waits for it, in the middle of making the slot.
        with closing(psycopg2.connect(shop.dsn)) as connection:
            connection.cursor().execute("CREATE TABLE others ()")
            threads = [threading.Thread(target=begin, args=(hub,)) for hub in hubs]
            for hub in hubs:
                hub.on("items", "inserted")(recorder)
                hub.on_gap(recorder)
            for each in threads:
                each.start()
            eventually(lambda: slots(shop, "confirmed_flush_lsn"), lambda found: found == [None])
            connection.rollback()
        for each in threads:
            each.join(DEADLINE)
        assert failed.items == []
        shop("INSERT INTO items VALUES (1)")
        assert [each.id for each in recorder.wait(1)] == [1]
        assert sum(hub.status().active for hub in hubs) == 1
        assert len(slots(shop)) == 1
    finally:
        for hub in hubs:
            hub.stop()


def test_a_slot_left_behind(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A new consumer gets what is committed from now on, also with a former one's slot."""
    hub.on("items", "inserted")(recorder)
    hub.on_gap(recorder)
    start(hub, shop.dsn)
    assert hub.stop()
    shop("DELETE FROM pgsignals.consumers")
    shop("INSERT INTO items VALUES (1)")
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (2)")
    settle(hub)
    assert [each.id for each in recorder.items] == [2]


def test_a_server_without_a_slot_to_spare(
    hub: pgsignals.Hub, each_version: int, connect: Callable[[str], Database]
) -> None:
    """start() says what the server lacks, and leaves nothing that reads."""
    with server_of_its_own(each_version, max_replication_slots="1") as server:
        db = connect(server.create_database())
        db("CREATE TABLE items (id bigint PRIMARY KEY)")
        start(hub, db.dsn)
        assert hub.stop()
        for name in ("other", None):
            with pytest.raises(pgsignals.DatabaseError, match="replication slots are in use"):
                start(hub, db.dsn, name=name)


def test_a_server_whose_log_is_not_logical(
    hub: pgsignals.Hub, each_version: int, connect: Callable[[str], Database]
) -> None:
    """start() says which setting it takes."""
    with server_of_its_own(each_version, wal_level="replica") as server:
        db = connect(server.create_database())
        db("CREATE TABLE items (id bigint PRIMARY KEY)")
        for name in ("mailer", None):
            with pytest.raises(pgsignals.PgSignalsError, match="wal_level"):
                start(hub, db.dsn, name=name)


def test_a_role_without_the_right(hub: pgsignals.Hub, shop: Database) -> None:
    """start() names the grant that a role lacks for reading the log."""
    [(database,)] = shop("SELECT current_database()")
    role = f"role_{database}"
    shop(f"CREATE ROLE {role} LOGIN; ALTER DATABASE {database} OWNER TO {role}")
    try:
        shop(f"ALTER TABLE items OWNER TO {role}; GRANT CREATE ON SCHEMA public TO {role}")
        for name in ("mailer", None):
            with pytest.raises(pgsignals.DatabaseError, match=r"ALTER ROLE .* REPLICATION"):
                start(hub, shop.dsn.replace("postgres@", f"{role}@"), name=name)
    finally:
        shop(f"ALTER DATABASE {database} OWNER TO postgres")
        shop(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_a_failed_start_leaves_the_slot_free(
    hub: pgsignals.Hub, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that fails behind the opening of the stream does not keep the slot from others."""
    from pgsignals.sources import durable

    def fails(*_: object) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr(durable.Backfilling, "begin", fails)
    for name in ("mailer", None):
        with pytest.raises(RuntimeError, match="half-way"):
            start(hub, shop.dsn, name=name)
    eventually(lambda: slots(shop, "active"), lambda found: found == [False])


def test_a_fast_shutdown(
    hub: pgsignals.Hub,
    each_version: int,
    connect: Callable[[str], Database],
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 10,000 events unacknowledged and a receiver that hangs it takes seconds, ten times.

    Then all of them come.
    """
    # Otherwise it would wait longer each time before it connects again.
    monkeypatch.setattr("pgsignals.sources.thread.HEALTHY_SECONDS", 0.0)
    with server_of_its_own(each_version) as server:
        db = connect(server.create_database())
        db("CREATE TABLE items (id bigint PRIMARY KEY)")
        gate, entered = threading.Event(), threading.Event()

        @hub.on("items", "inserted")
        def hangs(event: pgsignals.Event) -> None:
            entered.set()
            assert gate.wait(2 * DEADLINE)
            recorder(event)

        hub.on_gap(recorder)
        start(hub, db.dsn)
        db("INSERT INTO items SELECT generate_series(1, 10000)")
        assert entered.wait(DEADLINE)
        took = []
        for _ in range(10):
            began = time.monotonic()
            server.stop("fast")
            took.append(time.monotonic() - began)
            server.start()
            until_read(connect(db.dsn))
        assert max(took) < 5.0, took
        gate.set()
        recorder.wait_until(is_item(10000))
        assert gaps(recorder.items) == []
        assert {event.id for event in recorder.items} == {*range(1, 10001)}
        hub.stop()


def test_a_crash_of_the_server(
    hub: pgsignals.Hub,
    each_version: int,
    connect: Callable[[str], Database],
    recorder: Recorder,
) -> None:
    """What was acknowledged before may come again and says so; nothing is lost, nor a Gap told."""
    with server_of_its_own(each_version, wal_writer_delay="10s") as server:
        db = connect(server.create_database())
        db("CREATE TABLE items (id bigint PRIMARY KEY, n int)")
        hub.on("items", "inserted")(recorder)
        hub.on_gap(recorder)
        start(hub, db.dsn, pgsignals.watch("items", extra=["n"]))
        for number in range(5):
            db(
                "INSERT INTO items SELECT g, %s FROM generate_series(%s, %s) AS g",
                (number, 1000 * number + 1, 1000 * number + 1000),
            )
            recorder.wait(1000 * number + 1000)
            server.stop("immediate")
            server.start()
            db = connect(db.dsn)
        db("INSERT INTO items VALUES (0, 9)")
        recorder.wait_until(is_item(0))
        assert gaps(recorder.items) == []
        check_deliveries(recorder.items, "n")
        assert {event.id for event in recorder.items} == {*range(5001)}
        hub.stop()


def test_a_promotion(
    hub: pgsignals.Hub,
    each_version: int,
    connect: Callable[[str], Database],
    recorder: Recorder,
) -> None:
    """A server that was promoted may lack what was committed last: a Gap, and events go on."""
    with server_of_its_own(each_version) as server:
        db = connect(server.create_database())
        db("CREATE TABLE items (id bigint PRIMARY KEY)")
        hub.on("items", "inserted")(recorder)
        hub.on_gap(recorder)
        start(hub, db.dsn)
        db("INSERT INTO items VALUES (1)")
        recorder.wait(1)
        server.stop("immediate")
        assert server._home is not None
        (server._home / "data" / "standby.signal").touch()
        server.start()
        db = connect(db.dsn)
        assert db("SELECT pg_promote(true, %s)", (int(DEADLINE),)) == [(True,)]
        found = recorder.wait_until(lambda each: getattr(each, "reason", None) == "restored")
        assert "promoted" in found[-1].detail
        until_heard(db, recorder, 2)
        hub.stop()


@pytest.mark.parametrize("meanwhile", ["it runs", "it is down"])
def test_a_restore_over_the_database(
    each_server: Server,
    shop: Database,
    hub: pgsignals.Hub,
    recorder: Recorder,
    tmp_path: Path,
    meanwhile: str,
) -> None:
    """``pg_restore --clean`` takes back what was delivered: a Gap says so, and events go on."""
    told = Recorder()
    hub.on_gap(told)
    hub.on("items", "inserted")(recorder)
    start(hub, shop.dsn, lease=1.0)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    dump, programs = tmp_path / "dump", each_server.installation.bindir
    subprocess.run([programs / "pg_dump", "-Fc", f"--file={dump}", shop.dsn], check=True)
    shop("INSERT INTO items VALUES (2)")
    recorder.wait(2)
    if meanwhile == "it is down":
        assert hub.stop()
    restore = [programs / "pg_restore", "--clean", "--if-exists", "-1", f"--dbname={shop.dsn}"]
    done = eventually(
        lambda: subprocess.run([*restore, dump], stderr=subprocess.PIPE, text=True),
        lambda done: "deadlock detected" not in done.stderr,
    )
    assert not done.returncode, done.stderr
    if meanwhile == "it is down":
        start(hub, shop.dsn, lease=1.0)
    told.wait_until(lambda gap: gap.reason == "restored")
    until_heard(shop, recorder, 3)


def test_another_cluster(
    hub: pgsignals.Hub,
    shop: Database,
    each_version: int,
    connect: Callable[[str], Database],
    each_server: Server,
    recorder: Recorder,
    tmp_path: Path,
) -> None:
    """Restored where the log has not come so far, a consumer says so, and hears what comes."""
    hub.on("items", "inserted")(recorder)
    hub.on_gap(recorder)
    for _ in range(3):
        # The first cluster's log is far ahead of the second one's.
        shop("SELECT pg_switch_wal()")
        shop("INSERT INTO items SELECT coalesce(max(id), 0) + 1 FROM items")
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (10)")
    recorder.wait(1)
    until_saved(shop)
    assert hub.stop()
    dump, programs = tmp_path / "dump", each_server.installation.bindir
    subprocess.run([programs / "pg_dump", "-Fc", f"--file={dump}", shop.dsn], check=True)
    with server_of_its_own(each_version) as server:
        other = connect(server.create_database(shop.connection.info.dbname))
        subprocess.run([programs / "pg_restore", f"--dbname={other.dsn}", dump], check=True)
        # As if the position were of a log that has come much further.
        other("UPDATE pgsignals.consumers SET lsn = lsn + (1::bigint << 40)")
        [slot] = slots(shop)
        other("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
        start(hub, other.dsn)
        other("INSERT INTO items VALUES (11)")
        found = recorder.wait_until(is_item(11))
        assert "restored" in [gap.reason for gap in gaps(found)]
        settle(hub)
        until_saved(other)
        # The position of the other history is not told to the server: it would skip all until then.
        end_readers(other)
        other("INSERT INTO items VALUES (12)")
        recorder.wait_until(is_item(12))
        hub.stop()


def test_a_publication_made_anew(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """No slot gets past the time without it, on older servers: a Gap, and events go on."""
    hub.on("items", "inserted")(recorder)
    hub.on_gap(recorder)
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    shop("DROP PUBLICATION pgsignals")
    shop("INSERT INTO items VALUES (2)")
    shop("CREATE PUBLICATION pgsignals")
    shop("INSERT INTO items VALUES (3)")
    until_heard(shop, recorder, 4)
    ids = {each.id for each in recorder.items if not isinstance(each, pgsignals.Gap)}
    assert {2, 3} <= ids or gaps(recorder.items)


def test_a_missing_publication(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A consumer that may not make it says so, goes on once it is there, and drops no slot."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop.dsn)
    assert hub.stop()
    shop("DROP PUBLICATION pgsignals")
    with pytest.raises(pgsignals.DatabaseError, match="pgsignals install --delivery wal"):
        start(hub, shop.dsn, install="check")
    assert len(slots(shop)) == 1
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait_until(is_item(1))


def test_a_long_log_without_anything_for_us(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind many messages of others a consumer comes up, and renews its claim on the way."""
    from pgsignals.wal import reader

    monkeypatch.setattr(reader, "MOST_READ", 100)
    hub.on("items", "inserted")(recorder)
    start(hub, shop.dsn)
    settle(hub)
    assert hub.stop()
    shop(
        "DO $$ BEGIN FOR i IN 1..20000 LOOP"
        " PERFORM pg_logical_emit_message(i % 2 = 0, 'others', 'text'); END LOOP; END $$"
    )
    shop("INSERT INTO items VALUES (1)")
    start(hub, shop.dsn)
    assert recorder.wait(1)[0].id == 1
    settle(hub)
    assert hub.status().reconnects == 0
