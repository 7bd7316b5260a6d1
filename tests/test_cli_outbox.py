"""``consumers``, ``dead-letters`` and ``--delivery outbox``: what an operator does."""

from __future__ import annotations

import json
import threading

import pytest

import pgsignals
from pgsignals import Hub
from pgsignals.outbox import administration
from tests.commands import run
from tests.conftest import Database, Recorder


def text(lines: list[str]) -> str:
    """What a command printed, as one text."""
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders."""
    db("CREATE TABLE orders (id bigint PRIMARY KEY)")


def test_a_deployment(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """What install makes is all that a start with install="check" needs, by its SQL as well."""
    with pytest.raises(pgsignals.DriftError, match="pgsignals install --delivery outbox"):
        hub.start(dsn, ["orders"], delivery="outbox", install="check")
    script = run("sql", "orders", "--delivery", "outbox", "--dsn", dsn)
    installed = run("install", "orders", "--delivery", "outbox", "--dsn", dsn)
    assert "3 triggers installed" in text(installed.out)
    again = run("sql", "orders", "--delivery", "outbox", "--dsn", dsn)
    assert "Nothing to do" in text(again.out)
    db("DROP SCHEMA pgsignals CASCADE")
    assert run("uninstall", "--dsn", dsn).code == 0
    db(text(script.out))
    hub.on("orders")(recorder)
    hub.start(dsn, ["orders"], delivery="outbox", install="check", name="mailer")
    db("INSERT INTO orders VALUES (1)")
    recorder.wait(1)


def test_consumers(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """Consumers are listed with their lag, reset and dropped, unless a process reads for them."""
    hub.on("orders", "inserted")(recorder)
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    db("INSERT INTO orders VALUES (1)")
    recorder.wait(1)
    refused = run("consumers", "drop", "mailer", "--dsn", dsn)
    assert refused.code == 1
    assert "Stop it first" in text(refused.err)
    hub.stop()
    db("INSERT INTO orders SELECT generate_series(2, 11)")
    [found] = json.loads(text(run("consumers", "list", "--json", "--dsn", dsn).out))["consumers"]
    assert (found["name"], found["active"], found["lag"]) == ("mailer", False, 10)
    status = run("status", "--dsn", dsn)
    assert "1 consumer" in text(status.out)
    assert run("consumers", "reset", "mailer", "--to", "now", "--dsn", dsn).code == 0
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    db("INSERT INTO orders VALUES (12)")
    assert [event.id for event in recorder.wait(2)] == [1, 12]
    hub.stop()
    assert run("consumers", "reset", "mailer", "--to", "earliest", "--dsn", dsn).code == 0
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    again = recorder.wait(14)[2:]
    assert [event.id for event in again] == list(range(1, 13))
    assert all(event.redelivered for event in again)
    hub.stop()
    assert run("consumers", "drop", "mailer", "--dsn", dsn).code == 0
    assert db("SELECT * FROM pgsignals.consumers") == []
    unknown = run("consumers", "drop", "mailer", "--dsn", dsn)
    assert "no consumer 'mailer'" in text(unknown.err)


def test_a_reset_beside_a_holder(
    dsn: str, db: Database, hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that comes while a consumer is reset does not write its own cursor over it."""
    hub.on("orders", "inserted")(recorder)
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer", lease=1.0)
    db("INSERT INTO orders VALUES (1)")
    recorder.wait(1)
    monkeypatch.setattr(administration, "_check_idle", lambda cursor, name: None)
    with db.connection.cursor() as cursor:
        administration.reset_consumer(cursor, "mailer", "earliest")
    first, again = recorder.wait(2)
    assert again.uid == first.uid
    assert again.redelivered


def test_dead_letters(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """Dead letters are listed, shown with the traceback, delivered again, and dropped."""
    broken = threading.Event()
    broken.set()
    kept = threading.Semaphore(0)

    @hub.on("orders", retries=0)
    def receive(event: pgsignals.Event) -> None:
        if broken.is_set():
            kept.release()
            raise ValueError("poison")
        recorder(event)

    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    db("INSERT INTO orders VALUES (1), (2)")
    assert kept.acquire(timeout=15)
    assert kept.acquire(timeout=15)
    hub.stop()
    listed = json.loads(text(run("dead-letters", "list", "--json", "--dsn", dsn).out))
    first, second = (each["id"] for each in listed["dead_letters"])
    shown = run("dead-letters", "show", str(first), "--dsn", dsn)
    assert "ValueError: poison" in text(shown.out)
    assert "in receive" in text(shown.out)
    broken.clear()
    assert run("dead-letters", "retry", str(first), "--dsn", dsn).code == 0
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    assert [event.id for event in recorder.wait(1)] == [1]
    hub.stop()
    assert run("dead-letters", "retry", "--dsn", dsn).code == 2
    dropped = run("dead-letters", "drop", str(second), "--dsn", dsn)
    assert "1 dead letter dropped" in text(dropped.out)
    assert "no dead letters" in text(run("dead-letters", "list", "--dsn", dsn).out)


def test_without_an_outbox(dsn: str) -> None:
    """A database without an outbox is an error that says so."""
    result = run("consumers", "list", "--dsn", dsn)
    assert result.code == 1
    assert "no outbox" in text(result.err)
