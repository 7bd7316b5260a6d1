"""``--delivery wal``: what is installed, shown and removed, and what an operator does."""

from __future__ import annotations

import json
import threading

import pytest

from pgsignals import Hub
from pgsignals.consumers.slot_states import drop_slots
from pgsignals.triggers.names import slot_name
from tests.conftest import DEADLINE, Database, Recorder
from tests.inside import run
from tests.waiting import eventually

PUBLISHED = (
    "SELECT p.pubname, r.prrelid::regclass::text FROM pg_publication p"
    " LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid ORDER BY 1, 2"
)
EMPTY = [("pgsignals", None), ("pgsignals_inserts", None)]
OURS = "SELECT proname FROM pg_proc WHERE proname LIKE 'pgsignals\\_%'"


def text(lines: list[str]) -> str:
    """What a command printed, as one text."""
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def orders(each_db: Database) -> None:
    """A table of orders, and one without a key."""
    each_db("CREATE TABLE orders (id int PRIMARY KEY, n int); CREATE TABLE notes (id int)")


def slots(db: Database) -> list[str]:
    """The slots of the database."""
    found = db("SELECT slot_name FROM pg_replication_slots WHERE database = current_database()")
    return [name for (name,) in found]


def test_a_deployment(each_dsn: str, each_db: Database, hub: Hub, recorder: Recorder) -> None:
    """What install makes is all that a start with install="check" needs, by its SQL as well."""
    dsn, db = each_dsn, each_db
    watched = ("orders", "notes:inserted", "notes:updated", "--delivery", "wal", "--dsn", dsn)
    script = run("sql", *watched)
    installed = run("install", *watched)
    assert "5 triggers installed" in text(installed.out)
    there = db(PUBLISHED)
    assert there == [
        ("pgsignals", "orders"),
        ("pgsignals_inserts", "notes"),
        ("pgsignals_inserts", "orders"),
    ]
    assert "Nothing to do" in text(run("sql", *watched).out)
    assert run("uninstall", "--dsn", dsn).code == 0
    assert db(PUBLISHED) == []
    db("DROP SCHEMA pgsignals CASCADE")
    db(text(script.out))
    assert db(PUBLISHED) == there
    hub.on("orders")(recorder)
    watchers = ["orders", ("notes", "inserted"), ("notes", "updated")]
    hub.start(dsn, watchers, delivery="wal", install="check", name="mailer")
    db("INSERT INTO orders VALUES (1)")
    recorder.wait(1)


def test_sql_uninstall(each_dsn: str, each_db: Database) -> None:
    """Its SQL takes the tables out of the publications, and with the last ones those."""
    dsn, db = each_dsn, each_db
    given = ("--delivery", "wal", "--dsn", dsn)
    assert run("install", "orders", "notes:inserted", *given).code == 0
    db(text(run("sql", "--uninstall", "orders", *given).out))
    assert db(PUBLISHED) == [("pgsignals", None), ("pgsignals_inserts", "notes")]
    db(text(run("sql", "--uninstall", "--dsn", dsn).out))
    assert db(PUBLISHED) == []
    assert db(OURS) == []


def test_namespaces_share_publications(each_dsn: str, each_db: Database) -> None:
    """A table leaves a publication when no namespace's watcher needs it there any more."""
    dsn, db = each_dsn, each_db
    given = ("--delivery", "wal", "--dsn", dsn)
    assert run("install", "orders", *given).code == 0
    assert run("install", "orders:inserted", "--namespace", "reports", *given).code == 0
    assert run("uninstall", "--dsn", dsn).code == 0
    assert db(PUBLISHED) == [("pgsignals", None), ("pgsignals_inserts", "orders")]
    assert run("uninstall", "--namespace", "reports", "--dsn", dsn).code == 0
    assert db(PUBLISHED) == []


def test_prune(each_dsn: str, each_db: Database) -> None:
    """What is pruned is not published any more, either."""
    given = ("--delivery", "wal", "--dsn", each_dsn)
    assert run("install", "orders", "notes:inserted", *given).code == 0
    assert "removed inserted on public.notes" in run("install", "orders", "--prune", *given).out
    assert each_db(PUBLISHED) == [("pgsignals", "orders"), ("pgsignals_inserts", "orders")]


def test_status(each_dsn: str) -> None:
    """It tells what serves each watcher, and why rows would not do."""
    watched = ("orders:inserted", "notes:updated", "--delivery", "wal", "--dsn", each_dsn)
    assert run("install", *watched).code == 0
    told = run("status", *watched)
    assert told.code == 0
    assert "SERVED BY" in told.out[0]
    [rows] = [line for line in told.out if "public.orders" in line]
    assert "rows" in rows
    [messages] = [line for line in told.out if "public.notes" in line]
    assert "messages" in messages
    assert "no replica identity" in messages
    found = json.loads(text(run("status", "--json", *watched).out))["watchers"]
    assert {(each["table"], each["served"]) for each in found} == {
        ("orders", "rows"),
        ("notes", "messages"),
    }
    assert [each["lacking"] for each in found if each["served"] == "rows"] == [""]


def test_capture(each_dsn: str, each_db: Database) -> None:
    """By --capture rows are refused, or not used; it is of WAL delivery alone."""
    refused = run("install", "orders", "--capture", "rows", "--dsn", each_dsn)
    assert refused.code == 2
    assert "--delivery wal" in text(refused.err)
    given = ("--delivery", "wal", "--dsn", each_dsn)
    refused = run("install", "notes:updated", "--capture", "rows", *given)
    assert refused.code == 1
    assert "cannot serve 'updated'" in text(refused.err)
    assert run("install", "orders", "--capture", "messages", *given).code == 0
    assert each_db(PUBLISHED) == EMPTY


def test_consumers(each_dsn: str, each_db: Database, hub: Hub, recorder: Recorder) -> None:
    """They are listed with what the server keeps for them, reset to now, and dropped."""
    dsn, db = each_dsn, each_db
    hub.on("orders", "inserted")(recorder)
    hub.start(dsn, ["orders"], delivery="wal", name="mailer")
    db("INSERT INTO orders VALUES (1)")
    recorder.wait(1)
    refused = run("consumers", "drop", "mailer", "--dsn", dsn)
    assert "Stop it first" in text(refused.err)
    hub.stop()
    db("INSERT INTO orders SELECT generate_series(2, 1000)")
    [found] = json.loads(text(run("consumers", "list", "--json", "--dsn", dsn).out))["consumers"]
    [name] = slots(db)
    assert (found["name"], found["active"], found["slot"]["name"]) == ("mailer", False, name)
    assert found["unread_bytes"] > 0
    assert found["slot"]["retained_bytes"] >= found["unread_bytes"]
    assert found["slot"]["safe_bytes"] > 0
    told = text(run("consumers", "list", "--dsn", dsn).out)
    assert f"mailer reads the write-ahead log by the replication slot {name}" in told
    assert "gives it up after" in told
    refused = run("consumers", "reset", "mailer", "--to", "earliest", "--dsn", dsn)
    assert refused.code == 1
    assert "it can only be reset to 'now'" in text(refused.err)
    assert run("consumers", "reset", "mailer", "--to", "now", "--dsn", dsn).code == 0
    hub.start(dsn, ["orders"], delivery="wal", name="mailer")
    db("INSERT INTO orders VALUES (1001)")
    assert [event.id for event in recorder.wait(2)] == [1, 1001]
    hub.stop()
    dropped = run("consumers", "drop", "mailer", "--json", "--dsn", dsn)
    assert json.loads(text(dropped.out)) == {"dropped": "mailer", "dead_letters": 0}
    assert db("SELECT FROM pgsignals.consumers") == []
    assert slots(db) == []


def test_a_slot_that_is_gone(each_dsn: str, each_db: Database, hub: Hub) -> None:
    """A consumer whose slot somebody has dropped is listed with what that means."""
    hub.start(each_dsn, ["orders"], delivery="wal", name="mailer")
    hub.stop()
    with each_db.connection.cursor() as cursor:
        drop_slots(cursor, slots(each_db))
    told = text(run("consumers", "list", "--dsn", each_dsn).out)
    assert "its replication slot is gone, so that it will get a Gap" in told
    assert run("consumers", "drop", "mailer", "--dsn", each_dsn).code == 0


def test_uninstall_all(each_dsn: str, each_db: Database, hub: Hub) -> None:
    """A consumer's watchers stay unless forced; --schema takes all along, slots too."""
    dsn, db = each_dsn, each_db
    hub.start(dsn, ["orders"], delivery="wal", name="mailer")
    hub.stop()
    # The session that has ended is a listener for a moment.
    eventually(
        lambda: text(run("uninstall", "--dsn", dsn).err), lambda said: "A consumer reads" in said
    )
    assert run("uninstall", "--force", "--dsn", dsn).code == 0
    # The slot is there still, which cannot be read without its publications.
    assert db(PUBLISHED) == EMPTY
    assert run("install", "orders", "--delivery", "wal", "--dsn", dsn).code == 0
    removed = run("uninstall", "--schema", "--yes", "--dsn", dsn)
    assert removed.code == 0
    assert (db(PUBLISHED), slots(db), db(OURS)) == ([], [], [])
    assert db("SELECT FROM pg_namespace WHERE nspname = 'pgsignals'") == []


def test_watch(each_dsn: str, each_db: Database) -> None:
    """It prints what it reads from the log, and leaves nothing behind."""
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.wait(0.05):
            number += 1
            each_db("INSERT INTO orders VALUES (%s)", [number])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = run(
            *("watch", "orders:inserted", "--delivery", "wal", "--json", "--count", "3"),
            *("--timeout", str(DEADLINE), "--dsn", each_dsn),
        )
    finally:
        ended.set()
        writer.join()
    assert seen.code == 0
    numbers = [json.loads(line)["id"] for line in seen.out]
    assert numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2]
    # The session that has ended may hold its slot for a moment.
    eventually(lambda: slots(each_db), lambda found: found == [])
    assert each_db("SELECT FROM pg_publication_rel") == []


def test_the_name_of_a_slot(each_dsn: str, each_db: Database, hub: Hub) -> None:
    """A consumer is found by its slot's name, and the slot by the consumer's."""
    hub.start(each_dsn, ["orders"], delivery="wal", name="Mailer 2/é")
    [(database,)] = each_db("SELECT current_database()")
    assert slots(each_db) == [slot_name(database, "Mailer 2/é")]
