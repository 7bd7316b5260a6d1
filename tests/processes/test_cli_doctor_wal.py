"""``pgsignals doctor`` where the write-ahead log is read: each thing that it finds, and the fix."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from psycopg2.sql import SQL, Identifier

from pgsignals import Gap, Hub
from pgsignals.consumers.slot_states import drop_slots
from pgsignals.core.transport import Transport
from pgsignals.overview.checks.findings import Finding
from pgsignals.overview.checks.wal import examine_wal
from pgsignals.testing import Server
from tests.commands import Result
from tests.conftest import Database, Recorder
from tests.forked import examined
from tests.inside import run
from tests.waiting import eventually

CHECKS = {
    "wal_level",
    "replication",
    "slots left",
    "senders left",
    "slot limit",
    "slots",
    "publications",
    "replica identities",
    "synchronous commit",
}


@pytest.fixture(autouse=True)
def orders(each_db: Database) -> None:
    """A table of orders."""
    each_db("CREATE TABLE orders (id int PRIMARY KEY, n int)")


@pytest.fixture
def mailer(each_dsn: str, each_db: Database) -> str:
    """A consumer that is down; the name of its slot, which its session has left."""
    hub = Hub()
    hub.start(each_dsn, ["orders"], delivery="wal", name="mailer")
    hub.stop()
    mine = "SELECT slot_name, active FROM pg_replication_slots WHERE database = current_database()"
    [(name, _)] = eventually(lambda: each_db(mine), lambda found: not found[0][1])
    return str(name)


def checked(db: Database, **given: Any) -> dict[str, Finding]:
    """All findings about WAL delivery, by name."""
    with db.connection.cursor() as cursor:
        return {each.check: each for each in examine_wal(cursor, Transport.WAL, **given)}


class Gauges:
    """Metrics that keep the gauges of consumers."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, str], Callable[[], float]] = {}

    def count(self, name: str, amount: int, /, **labels: str) -> None:
        """Do nothing."""

    def gauge(self, name: str, read: Callable[[], float], /, **labels: str) -> None:
        """Keep it."""
        self._read[name, labels.get("consumer", "")] = read

    def read(self, name: str, consumer: str) -> float:
        """The gauge's value, as soon as the gauge is there."""
        eventually(lambda: (name, consumer) in self._read, bool)
        return self._read[name, consumer]()


def told(result: Result) -> str:
    """What a command printed, as one text."""
    return "\n".join(result.out)


@contextmanager
def configured(db: Database, **settings: str) -> Iterator[None]:
    """The server with these settings, which take no restart."""
    for name, value in settings.items():
        db(SQL("ALTER SYSTEM SET {} = %s").format(Identifier(name)), [value])
    db("SELECT pg_reload_conf()")
    try:
        for name in settings:
            asked = "SELECT setting FROM pg_settings WHERE name = %s AND pending_restart = false"
            db(asked, [name])
        yield
    finally:
        for name in settings:
            db(SQL("ALTER SYSTEM RESET {}").format(Identifier(name)))
        db("SELECT pg_reload_conf()")


@pytest.mark.usefixtures("mailer")
def test_nothing_to_mend(each_dsn: str) -> None:
    """Where a consumer uses it, each check is there, whatever delivery is asked for."""
    code, found = examined(dsn=each_dsn)
    assert code == 0
    assert set(found) >= CHECKS
    assert {name: each["level"] for name, each in found.items() if each["level"] != "ok"} == {}


def test_nothing_is_said_to_others(each_db: Database) -> None:
    """Where nobody reads the log, and nobody asks for it, there is no check of it."""
    with each_db.connection.cursor() as cursor:
        assert list(examine_wal(cursor, Transport.OUTBOX)) == []
    assert set(checked(each_db)) == CHECKS


def test_a_server_that_does_not_have_it(connect: Callable[[str], Database]) -> None:
    """What a server lacks is named, with the statements: the level, slots, senders, the bound."""
    settings = {
        "wal_level": "replica",
        "max_replication_slots": "0",
        "max_wal_senders": "0",
        "max_slot_wal_keep_size": "-1",
    }
    with Server(settings=settings) as server:
        db = connect(server.create_database())
        found = checked(db)
        assert {name for name, each in found.items() if each.level == "fail"} == {
            "wal_level",
            "slots left",
            "senders left",
        }
        assert "ALTER SYSTEM SET wal_level = 'logical'" in found["wal_level"].fix
        assert "ALTER SYSTEM SET max_replication_slots = 10" in found["slots left"].fix
        assert "ALTER SYSTEM SET max_wal_senders = 10" in found["senders left"].fix
        assert found["slot limit"].level == "warn"
        assert "max_slot_wal_keep_size = '10GB'" in found["slot limit"].fix
        db("CREATE ROLE rds_superuser")
        db.connection.close()
        found = checked(connect(server.dsn()))
        assert "rds.logical_replication" in found["wal_level"].fix


def test_slots_that_nobody_reads_are_named_where_none_is_left(
    connect: Callable[[str], Database],
) -> None:
    """The one to be dropped is named where all slots are in use."""
    with Server(settings={"max_replication_slots": "1"}) as server:
        db = connect(server.create_database())
        db("SELECT pg_create_logical_replication_slot('somebody_s', 'pgoutput')")
        fix = checked(db)["slots left"].fix
        assert "SELECT pg_drop_replication_slot('somebody_s')" in fix


def test_the_right_to_read(each_dsn: str, each_db: Database, each_server: Server) -> None:
    """A role without REPLICATION learns the statement, which is Amazon's own on RDS."""
    name = each_dsn.rpartition("/")[2]
    role = Identifier(f"reader_{name}")
    each_db(SQL("CREATE ROLE {} LOGIN").format(role))
    as_role = each_server.dsn(name, f"reader_{name}")
    try:
        found = examined("--delivery", "wal", dsn=as_role)[1]["replication"]
        assert found["level"] == "warn"
        assert f'ALTER ROLE "reader_{name}" REPLICATION' in found["fix"]
        each_db("CREATE ROLE rds_replication")
        found = examined("--delivery", "wal", dsn=as_role)[1]["replication"]
        assert 'GRANT "rds_replication" TO' in found["fix"]
        each_db(SQL("GRANT rds_replication TO {}").format(role))
        assert examined("--delivery", "wal", dsn=as_role)[1]["replication"]["level"] == "ok"
    finally:
        each_db("DROP ROLE IF EXISTS rds_replication")
        each_db(SQL("DROP ROLE {}").format(role))


@pytest.mark.usefixtures("mailer")
def test_a_consumer_that_is_down(each_db: Database) -> None:
    """After a while it is told that nobody reads, with both ways out."""
    each_db("UPDATE pgsignals.consumers SET acknowledged_at = now() - interval '1 day'")
    found = checked(each_db)["slots"]
    assert found.level == "warn"
    assert "nobody reads it since 1d" in found.message
    assert "pgsignals consumers drop mailer" in found.fix


@pytest.mark.parametrize(("megabytes", "level"), [(1, "ok"), (70, "warn"), (120, "fail")])
@pytest.mark.usefixtures("mailer")
def test_a_slot_about_to_be_lost(each_db: Database, megabytes: int, level: str) -> None:
    """The nearer the bound, the louder."""
    with configured(each_db, max_slot_wal_keep_size="128MB"):
        for _ in range(megabytes):
            each_db("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1 << 20))")
        found = checked(each_db)["slots"]
        assert found.level == level
        if level != "ok":
            assert "Start its process" in found.fix


def test_a_transaction_that_holds_it_back(
    each_dsn: str,
    each_db: Database,
    hub: Hub,
    recorder: Recorder,
    connect: Callable[[str], Database],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the consumer reads all that comes, the forgotten transaction is named."""
    hub.on("orders")(recorder)
    hub.start(each_dsn, ["orders"], delivery="wal", name="mailer")
    other = connect(each_dsn)
    other("BEGIN")
    other("INSERT INTO orders VALUES (1)")
    [(pid,)] = other("SELECT pg_backend_pid()")
    monkeypatch.setattr("pgsignals.overview.checks.wal.OLD_TRANSACTION", "0 s")
    with configured(each_db, max_slot_wal_keep_size="64MB"):
        for _ in range(60):
            each_db("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1 << 20))")
        found = checked(each_db)["slots"]
    assert found.level != "ok"
    assert f"pg_terminate_backend({pid})" in found.fix
    other("COMMIT")
    recorder.wait(1)


def test_a_transaction_that_costs_the_slot(
    each_version: int,
    connect: Callable[[str], Database],
    hub: Hub,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A forgotten transaction is told of by doctor and the gauge before, while and after it costs.

    The consumer reads all that comes. When the transaction has ended, it gets a Gap, and goes on.
    """
    monkeypatch.setattr("pgsignals.outbox.housekeeping.EVERY_SECONDS", 0.1)
    monkeypatch.setattr("pgsignals.overview.checks.wal.OLD_TRANSACTION", "0 s")
    settings = {"max_slot_wal_keep_size": "64MB", "max_wal_size": "64MB", "shared_buffers": "16MB"}
    with Server(each_version, settings) as server:
        db, other = connect(server.create_database()), connect(server.create_database())
        db("CREATE TABLE orders (id int PRIMARY KEY)")
        hub.on("orders")(recorder)
        hub.on_gap(recorder)
        gauges = Gauges()
        given = {"delivery": "wal", "name": "mailer", "metrics": gauges}
        hub.start(db.dsn, ["orders"], heartbeat_timeout=2.0, **given)
        db("INSERT INTO orders VALUES (1)")
        recorder.wait(1)
        other("BEGIN")
        other("CREATE TABLE forgotten ()")
        [(pid,)] = other("SELECT pg_backend_pid()")

        def write() -> None:
            db("SELECT pg_logical_emit_message(false, 'others', repeat('x', 1 << 20))")

        for _ in range(45):
            write()
        found = checked(db)["slots"]
        assert (found.level, f"pg_terminate_backend({pid})" in found.fix) == ("warn", True)
        eventually(lambda: gauges.read("slot_safe_bytes", "mailer"), lambda left: left < 32 << 20)
        assert gauges.read("slot_retained_bytes", "mailer") > 32 << 20

        def costs() -> Finding:
            write()
            db("SELECT pg_switch_wal(); CHECKPOINT")
            return checked(db)["slots"]

        # Another slot is made as soon as this one is given up, and cannot be, for the same reason.
        found = eventually(costs, lambda found: "being made" in found.message)
        assert (found.level, f"process {pid} " in found.message) == ("fail", True)
        # Between two attempts there is none.
        eventually(
            lambda: told(run("consumers", "list", "--dsn", db.dsn)),
            lambda text: "which is being made" in text,
        )
        db("INSERT INTO orders VALUES (2)")
        other("ROLLBACK")
        gap = recorder.wait_until(lambda each: isinstance(each, Gap))[-1]
        assert gap.reason == "retention"
        eventually(
            lambda: db("INSERT INTO orders SELECT max(id) + 1 FROM orders RETURNING id"),
            lambda found: found[0][0] in {getattr(each, "id", 0) for each in recorder.items},
        )
        eventually(lambda: checked(db)["slots"].level, lambda level: level == "ok")
        hub.stop()


def test_a_slot_that_is_lost(each_db: Database, mailer: str) -> None:
    """One that the server has given up, or somebody has dropped, is a Gap to come."""
    with configured(each_db, max_slot_wal_keep_size="1MB"):
        for _ in range(40):
            each_db("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1 << 20))")
            each_db("SELECT pg_switch_wal()")
        each_db("CHECKPOINT")
        status = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s"
        assert each_db(status, [mailer]) == [("lost",)]
        found = checked(each_db)["slots"]
    assert found.level == "fail"
    assert "the server has given up the slot of 'mailer'" in found.message
    assert "max_slot_wal_keep_size" in found.fix
    with each_db.connection.cursor() as cursor:
        drop_slots(cursor, [mailer])
    found = checked(each_db)["slots"]
    assert found.level == "fail"
    assert "the slot of 'mailer' is gone" in found.message


def test_a_slot_that_nobody_reads_for_long(
    each_dsn: str, each_db: Database, mailer: str, hub: Hub, recorder: Recorder
) -> None:
    """The server that gives such a slot up is told of before, by the time that is left, and then.

    At its next start the consumer gets a Gap, and goes on.
    """
    if each_db.connection.server_version < 180000:
        pytest.skip("PostgreSQL 18 brought the setting")
    listing = ("consumers", "list", "--dsn", each_dsn)
    with configured(each_db, idle_replication_slot_timeout="1h"):
        found = checked(each_db)
        assert found["slots"].level == "ok"
        assert "gives one up that nobody reads for 1h" in found["slot limit"].message
        assert re.search(
            r"gives it up after .* more or in (1h|60m|59.*m) if nobody", told(run(*listing))
        )
    with configured(each_db, idle_replication_slot_timeout="3s"):
        found = eventually(lambda: checked(each_db), lambda f: f["slots"].level != "ok")
        assert "nobody reads it since" in found["slots"].message
        assert "the server gives it up in" in found["slots"].message
        assert "Start its process" in found["slots"].fix
        each_db("INSERT INTO orders VALUES (1)")
        status = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s"
        eventually(
            lambda: (each_db("CHECKPOINT"), each_db(status, [mailer]))[1],
            lambda found: found == [("lost",)],
        )
        found = checked(each_db)
        assert found["slots"].level == "fail"
        assert "(idle_timeout)" in found["slots"].message
        assert "SET idle_replication_slot_timeout" in found["slots"].fix
        assert "given up (idle_timeout): it will get a Gap" in told(run(*listing))
    hub.on("orders")(recorder)
    hub.on_gap(recorder)
    hub.start(each_dsn, ["orders"], delivery="wal", name="mailer")
    each_db("INSERT INTO orders VALUES (2)")
    [gap, event] = recorder.wait(2)
    assert gap.detail.endswith("idle_timeout")
    assert event.id == 2


def test_a_slot_of_nobody(each_db: Database, mailer: str) -> None:
    """One whose consumer is gone is told with the SQL that drops it, which does."""
    each_db("DELETE FROM pgsignals.consumers")
    found = checked(each_db)["slots"]
    assert found.level == "warn"
    assert mailer in found.message
    each_db(re.sub("^Run ", "", found.fix))
    assert checked(each_db)["slots"].level == "ok"


ALTERED = [
    "ALTER PUBLICATION pgsignals SET (publish = 'insert')",
    "ALTER PUBLICATION pgsignals_inserts SET (publish_via_partition_root = false)",
    "ALTER PUBLICATION pgsignals_inserts SET (publish = 'insert, update, delete, truncate')",
]


@pytest.mark.parametrize("statement", ALTERED)
@pytest.mark.usefixtures("mailer")
def test_publications_that_somebody_has_changed(each_db: Database, statement: str) -> None:
    """The fix is the statement that changes them back."""
    each_db(statement)
    found = checked(each_db)["publications"]
    assert found.level == "fail"
    each_db(re.sub("^Run ", "", found.fix))
    assert checked(each_db)["publications"].level == "ok"


@pytest.mark.usefixtures("mailer")
def test_publications_that_are_gone(each_db: Database) -> None:
    """Without them the log cannot be read; with a filter or of all tables they harm others."""
    each_db("ALTER PUBLICATION pgsignals SET TABLE orders WHERE (id > 1)")
    found = checked(each_db)["publications"]
    assert (found.level, "with a column list or a filter" in found.message) == ("fail", True)
    each_db("DROP PUBLICATION pgsignals")
    found = checked(each_db)["publications"]
    assert found.level == "fail"
    assert "pgsignals install --delivery wal" in found.fix
    each_db("CREATE PUBLICATION pgsignals FOR ALL TABLES")
    found = checked(each_db)["publications"]
    assert (found.level, "publishes all tables" in found.message) == ("fail", True)


@pytest.mark.usefixtures("mailer")
def test_a_key_that_was_dropped(each_db: Database) -> None:
    """The table's UPDATEs fail, until the statement of the fix takes it out."""
    each_db("ALTER TABLE orders DROP CONSTRAINT orders_pkey")
    found = checked(each_db)["replica identities"]
    assert found.level == "fail"
    assert "UPDATE and DELETE of orders fail" in found.message
    statement = re.search("ALTER PUBLICATION pgsignals DROP TABLE ONLY orders", found.fix)
    assert statement is not None
    each_db(statement[0])
    assert checked(each_db)["replica identities"].level == "ok"
    each_db("UPDATE orders SET n = 1")


def test_another_s_publication(each_dsn: str, each_db: Database, hub: Hub) -> None:
    """One that breaks the UPDATEs of a watched table is told; of other tables it is not."""
    each_db("CREATE TABLE notes (id int); CREATE TABLE others (id int)")
    hub.start(each_dsn, [("notes", "inserted")], delivery="wal")
    each_db("CREATE PUBLICATION theirs FOR TABLE others")
    assert checked(each_db)["replica identities"].level == "ok"
    each_db("ALTER PUBLICATION theirs ADD TABLE notes")
    found = checked(each_db)["replica identities"]
    assert found.level == "fail"
    assert "UPDATE and DELETE of notes fail" in found.message
    assert "'theirs', which is not ours" in found.message
    statement = re.search("ALTER TABLE notes REPLICA IDENTITY FULL", found.fix)
    assert statement is not None
    each_db(statement[0])
    assert checked(each_db)["replica identities"].level == "ok"


def test_a_computed_column_that_is_not_published(
    each_dsn: str, each_db: Database, each_version: int, hub: Hub
) -> None:
    """PostgreSQL 18 refuses UPDATEs where an identity has one; a publication may publish it."""
    if each_version < 18:
        pytest.skip("older versions have no such rule")
    each_db("CREATE TABLE notes (id int, twice int GENERATED ALWAYS AS (id * 2) STORED)")
    each_db("ALTER TABLE notes REPLICA IDENTITY FULL; INSERT INTO notes VALUES (1)")
    hub.start(each_dsn, [("notes", "inserted")], delivery="wal")
    each_db("CREATE PUBLICATION theirs FOR TABLE notes WITH (publish_generated_columns = stored)")
    each_db("UPDATE notes SET id = 2")
    assert checked(each_db)["replica identities"].level == "ok"
    each_db("ALTER PUBLICATION theirs SET (publish_generated_columns = none)")
    found = checked(each_db)["replica identities"]
    assert found.level == "fail"
    assert "UPDATE and DELETE of notes fail" in found.message


def test_commits_that_do_not_wait(each_dsn: str, each_db: Database) -> None:
    """Who writes with synchronous_commit off is told that events come later, and how to mend it."""
    name = each_dsn.rpartition("/")[2]
    each_db(SQL("ALTER DATABASE {} SET synchronous_commit = off").format(Identifier(name)))
    found = checked(each_db)["synchronous commit"]
    assert found.level == "warn"
    assert f"all roles in database {name}" in found.message
    assert "wal_writer_delay" in found.fix


def test_installing_takes_the_owner(each_dsn: str, each_db: Database, each_server: Server) -> None:
    """Rows are published by the table's owner: a role with TRIGGER alone is told."""
    name = each_dsn.rpartition("/")[2]
    role = Identifier(f"installer_{name}")
    each_db(SQL("CREATE ROLE {0} LOGIN; GRANT TRIGGER ON orders TO {0}").format(role))
    each_db(SQL("GRANT CREATE ON SCHEMA public TO {}").format(role))
    try:
        as_role = each_server.dsn(name, f"installer_{name}")
        found = examined("orders", "--delivery", "wal", dsn=as_role)[1]["privileges"]
        assert "does not own the table" in found["message"]
    finally:
        each_db(SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def test_metrics_of_slots(each_dsn: str, each_db: Database, monkeypatch: Any) -> None:
    """What the server keeps for a consumer, and how much more it may, are gauges of it."""
    monkeypatch.setattr("pgsignals.outbox.housekeeping.EVERY_SECONDS", 0.1)
    gauges = Gauges()
    with Hub().start(each_dsn, ["orders"], delivery="wal", name="mailer", metrics=gauges):
        assert 0 < gauges.read("slot_safe_bytes", "mailer") <= 2 << 30
        before = gauges.read("slot_retained_bytes", "mailer")
        each_db("SELECT pg_logical_emit_message(true, 'x', 'x')")
        eventually(lambda: gauges.read("slot_retained_bytes", "mailer"), lambda now: now != before)
