"""``consumers``, ``dead-letters`` and ``--delivery outbox``: what an operator does."""

from __future__ import annotations

import json
import threading
from datetime import datetime, timedelta, timezone

import psycopg2
import pytest

import pgsignals
from pgsignals import Hub
from pgsignals.outbox import administration
from pgsignals.outbox.housekeeping import tidy
from tests.conftest import DEADLINE, Database, Recorder
from tests.inside import run
from tests.waiting import eventually


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
    assert "in 1 partition and 1 consumer" in text(status.out)
    assert found["oldest"] in text(status.out)
    assert text(status.out).count("nobody reads") == 1
    outbox = json.loads(text(run("status", "--json", "--dsn", dsn).out))["outbox"]
    [again] = outbox["consumers"]
    assert outbox["partitions"] == 1
    assert outbox["bytes"] > 0
    assert (again["lag"], again["oldest"]) == (10, found["oldest"])
    assert again["lag_seconds"] >= found["lag_seconds"] > 0
    # Python 3.10 does not read the Z.
    oldest = datetime.fromisoformat(again["oldest_at"].replace("Z", "+00:00"))
    assert oldest > recorder.items[0].at
    assert (again["dead_letters"], again["lost_until"]) == (0, None)
    reset = run("consumers", "reset", "mailer", "--to", "now", "--json", "--dsn", dsn)
    assert json.loads(text(reset.out)) == {"reset": "mailer", "to": "now", "lost_until": None}
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
    dropped = run("consumers", "drop", "mailer", "--json", "--dsn", dsn)
    assert json.loads(text(dropped.out)) == {"dropped": "mailer", "dead_letters": 0}
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
    assert kept.acquire(timeout=DEADLINE)
    assert kept.acquire(timeout=DEADLINE)
    hub.stop()
    listed = json.loads(text(run("dead-letters", "list", "--json", "--dsn", dsn).out))
    first, second = (each["id"] for each in listed["dead_letters"])
    shown = run("dead-letters", "show", str(first), "--dsn", dsn)
    assert "ValueError: poison" in text(shown.out)
    assert "in receive" in text(shown.out)
    broken.clear()
    assert run("dead-letters", "retry", str(first), "--json", "--dsn", dsn).out == ['{"retried":1}']
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


def moment(db: Database) -> datetime:
    """The time by the server's clock, after which nothing has happened yet."""
    [(now,)] = db("SELECT clock_timestamp()")
    db("SELECT pg_sleep(0.001)")
    found: datetime = now
    return found


def test_a_reset_to_a_time(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """All that happened from then on comes, and nothing of before; a zone says which time."""
    hub.on("orders", "inserted")(recorder)
    hub.on_gap(recorder)
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    db("INSERT INTO orders VALUES (1)")
    early = moment(db)
    db("INSERT INTO orders SELECT generate_series(2, 3)")
    late = moment(db)
    db("INSERT INTO orders VALUES (4)")
    assert [event.id for event in recorder.wait(4)] == [1, 2, 3, 4]
    assert hub.stop()
    in_utc = early.astimezone(timezone.utc)
    elsewhere = early.astimezone(timezone(timedelta(hours=-5)))
    expected = [2, 3, 4]
    for given in (
        in_utc.replace(tzinfo=None).isoformat(),
        in_utc.replace(tzinfo=None).isoformat(" ") + "Z",
        elsewhere.isoformat(),
    ):
        recorder.items.clear()
        reset = run("consumers", "reset", "mailer", "--to", given, "--dsn", dsn)
        assert reset.code == 0
        assert f"goes on from {elsewhere if '-05' in given else in_utc}." in text(reset.out)
        assert reset.err == []
        [found] = json.loads(text(run("consumers", "list", "--json", "--dsn", dsn).out))[
            "consumers"
        ]
        assert found["lag"] == 3
        hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
        assert [event.id for event in recorder.wait(3)] == expected
        assert all(event.redelivered for event in recorder.items)
        assert hub.stop()
        assert len(recorder.items) == 3
    recorder.items.clear()
    with db.connection.cursor() as cursor:
        assert administration.reset_consumer(cursor, "mailer", late) is None
    db("INSERT INTO orders VALUES (5)")
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    assert [event.id for event in recorder.wait(2)] == [4, 5]


def test_a_reset_to_a_time_beside_transactions(
    dsn: str, db: Database, hub: Hub, recorder: Recorder
) -> None:
    """What was written before and committed later is not missed, nor what has a higher id."""
    hub.on("orders", "inserted")(lambda event: recorder(event.id))
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    assert hub.stop()
    slow = psycopg2.connect(dsn)
    try:
        db("INSERT INTO orders VALUES (1)")
        slow.cursor().execute("INSERT INTO orders VALUES (2)")
        since = moment(db)
        db("INSERT INTO orders VALUES (3)")
        assert (
            run("consumers", "reset", "mailer", "--to", since.isoformat(), "--dsn", dsn).code == 0
        )
        db("INSERT INTO orders VALUES (4)")
        slow.commit()
    finally:
        slow.close()
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    assert recorder.wait(3) == [3, 2, 4]
    assert hub.stop()
    # Two statements at once: the one that began first may take the higher id.
    ids = [found for (found,) in db("SELECT id FROM pgsignals.outbox ORDER BY id DESC LIMIT 2")]
    db("UPDATE pgsignals.outbox SET id = %s WHERE id = %s", (ids[0] + 1, ids[1]))
    recorder.items.clear()
    assert run("consumers", "reset", "mailer", "--to", since.isoformat(), "--dsn", dsn).code == 0
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    assert sorted(recorder.wait(2))[-1] == 4
    assert 3 in recorder.wait(2)


def test_a_reset_to_what_is_no_more(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """Where the outbox does not go back so far, the command says so, and a Gap until when."""
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    since = moment(db)
    db("INSERT INTO orders VALUES (1)")
    with db.connection.cursor() as cursor:
        tidy(cursor, segment_bytes=0)
        [(turned,)] = db("SELECT opened_at FROM pgsignals.segments WHERE segment = 1")
        db("INSERT INTO orders VALUES (2)")
        eventually(lambda: tidy(cursor), lambda emptied: emptied == [0])
    assert hub.stop()
    reset = run("consumers", "reset", "mailer", "--to", since.isoformat(), "--dsn", dsn)
    assert reset.code == 0
    assert "nothing from before" in text(reset.err)
    hub.on_gap(recorder)
    hub.on("orders", "inserted")(recorder)
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    gap, event = recorder.wait(2)
    assert (gap.reason, gap.since, gap.until) == ("retention", since, turned)
    assert event.id == 2


@pytest.mark.parametrize(
    ("to", "code", "message"),
    [
        ("yesterday", 2, "neither 'now' nor 'earliest' nor a time"),
        ("2999-01-01", 1, "yet to come"),
    ],
)
def test_a_reset_to_what_is_no_time(dsn: str, hub: Hub, to: str, code: int, message: str) -> None:
    """A time that cannot be read, or is yet to come, is refused, and nothing changes."""
    with hub.start(dsn, ["orders"], delivery="outbox", name="mailer"):
        pass
    refused = run("consumers", "reset", "mailer", "--to", to, "--dsn", dsn)
    assert refused.code == code
    assert message in text(refused.err)


def test_a_reset_forgets_no_loss(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """A loss that has yet to be announced is announced after a reset, unless that skips all."""
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    assert hub.stop()
    db("UPDATE pgsignals.consumers SET lost_until = now()")
    assert "mailer will get a Gap" in text(run("status", "--dsn", dsn).out)
    db("SELECT nextval('pgsignals.outbox_shed')")
    assert run("consumers", "reset", "mailer", "--to", "earliest", "--dsn", dsn).code == 0
    hub.on_gap(recorder)
    hub.start(dsn, ["orders"], delivery="outbox", name="mailer")
    assert [gap.reason for gap in recorder.wait(2)] == ["retention"] * 2


def test_a_time_without_a_zone(dsn: str, db: Database, hub: Hub) -> None:
    """Only the command assumes a zone."""
    with hub.start(dsn, ["orders"], delivery="outbox", name="mailer"):
        pass
    with (
        db.connection.cursor() as cursor,
        pytest.raises(pgsignals.ConfigurationError, match="no time zone"),
    ):
        administration.reset_consumer(cursor, "mailer", datetime(2026, 1, 1))
