"""Backfills: rows that exist come as snapshots, in order among the other events."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timezone
from typing import ClassVar

import psycopg2
import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import pgsignals
from pgsignals import ConfigurationError, Hub
from pgsignals.sources.polling import part_of
from pgsignals.testing import Server
from tests.backfills import rows
from tests.backfills import users as users
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import settle


def test_rows_come_in_the_order_of_their_keys(dsn: str, hub: Hub, recorder: Recorder) -> None:
    """Each row is an event once, with what an update carries, and then the backfill is done."""
    hub.on("users", "snapshot")(recorder)
    hub.start(dsn, [pgsignals.watch("users", extra=["name"])], delivery="outbox", name="mailer")
    backfill = hub.backfill("users", chunk=70)
    assert backfill.wait(DEADLINE)
    assert (backfill.state, backfill.done, backfill.total) == ("done", 500, 500)
    events = recorder.wait(500)
    assert [event.id for event in events] == list(range(1, 501))
    first = events[0]
    assert (first.op, first.key, first.values) == ("snapshot", {"id": 1}, {"name": "user 1"})
    assert (first.old, first.changed, dict(first.context)) == ({}, frozenset(), {})
    assert len({event.uid for event in events}) == 500
    assert not any(event.redelivered for event in events)


def test_without_operations_a_receiver_gets_snapshots_too(
    dsn: str, db: Database, hub: Hub, recorder: Recorder
) -> None:
    """``on(model)`` gets all that is delivered; who names other operations gets no snapshot."""
    updates = Recorder()
    hub.on("users")(recorder)
    hub.on("users", "updated")(updates)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    assert hub.backfill("users", where="id <= 3").wait(DEADLINE)
    db("UPDATE users SET name = 'last' WHERE id = 1")
    events = recorder.wait(4)
    assert [(e.op, e.id) for e in events] == [
        ("snapshot", 1),
        ("snapshot", 2),
        ("snapshot", 3),
        ("updated", 1),
    ]
    [update] = updates.wait(1)
    assert update.uid == events[3].uid


def test_where(dsn: str, hub: Hub, recorder: Recorder) -> None:
    """Only rows that meet the condition come, and all count as gone through."""
    hub.on("users", "snapshot")(recorder)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    backfill = hub.backfill("users", where="NEW.id % 100 = 0 OR name LIKE '%er 7' -- or so")
    assert backfill.wait(DEADLINE)
    assert [event.id for event in recorder.wait(6)] == [7, 100, 200, 300, 400, 500]
    assert (backfill.done, backfill.status.delivered) == (500, 6)


def test_nothing_meets_the_condition(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """A backfill without a single event ends, beside writers."""
    hub.on("users")(recorder)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    backfill = hub.backfill("users", where="false", chunk=1)
    rows(db, 1, 501)
    assert backfill.wait(DEADLINE)
    assert [event.op for event in recorder.wait(1)] == ["inserted"]


def test_an_empty_table(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """A backfill of nothing is done."""
    db("TRUNCATE users")
    hub.on("users")(recorder)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    backfill = hub.backfill("users")
    assert backfill.wait(DEADLINE)
    assert (backfill.done, backfill.total) == (0, 0)


def test_watchers_of_a_model_share_a_snapshot(
    dsn: str, db: Database, hub: Hub, recorder: Recorder
) -> None:
    """It carries what each of them asks for; a labelled watcher has its own, whatever its when."""
    db("ALTER TABLE users ADD age int DEFAULT 7")
    labelled = Recorder()
    hub.on("users", "snapshot", name="user 2")(recorder)
    hub.on("renamed", "snapshot")(labelled)
    watchers = [
        pgsignals.watch("users", "updated", columns=["name"]),
        pgsignals.watch("users", "inserted", extra=["age", "name"]),
        pgsignals.watch("users", "updated", when="OLD.name <> NEW.name", label="renamed"),
    ]
    hub.start(dsn, watchers, delivery="outbox", name="mailer")
    assert hub.backfill("users").wait(DEADLINE)
    [event] = recorder.wait(1)
    assert (event.id, event.values) == (2, {"name": "user 2", "age": 7})
    assert labelled.items == []
    assert hub.backfill("renamed", where="id = 1").wait(DEADLINE)
    [event] = labelled.wait(1)
    assert (event.id, event.label, event.values) == (1, "renamed", {})
    assert len(recorder.items) == 1


def key_of(event: pgsignals.Event) -> dict[str, object]:
    """The key, whose representation has no address in it."""
    return {
        name: bytes(value) if isinstance(value, memoryview) else value
        for name, value in event.key.items()
    }


@pytest.mark.parametrize(
    ("types", "keys"),
    [
        ("a int8", "(-5),(0),(9000000000)"),
        ("a uuid", "(gen_random_uuid()),(gen_random_uuid()),(gen_random_uuid())"),
        (
            "a text",
            r"(''),('%s %'),('{}'),('a''b'),('a\"b'),(E'a\tb'),(E'a\nb'),(E'\\'),('ä'),('Z'),"
            "('a'),('NULL'),('\U0001f600')",
        ),
        ('a text COLLATE "C"', "('a'),('B'),('b'),('ä')"),
        ("a varchar(9)", "('x'),('y '),('z')"),
        ("a char(3)", "('a'),('b'),('abc')"),
        ("a timestamptz", "('2024-03-31 01:30:00.123456+01'),('-infinity'),('0044-03-15 BC')"),
        ("a timestamp", "('2024-03-31 02:30'),('infinity')"),
        ("a date", "('2024-02-29'),('1999-12-31')"),
        ("a interval", "('1 month'),('-3 days 2 hours')"),
        ("a numeric", "(1.10),('NaN'),(-1e30),(0.1)"),
        ("a float8", "(0.1),('NaN'),('-Infinity'),(1e300)"),
        ("a bool", "(true),(false)"),
        ("a bytea", r"('\x00ff'),('\x'),('\x5c27')"),
        ("a inet", "('10.0.0.1'),('::1')"),
        ("a bit varying", "(B'101'),(B'0')"),
        ("a bit(4)", "(B'1010'),(B'0001')"),
        ("a int[]", "('{1,2}'),('{}')"),
        ("a jsonb", """('{"b": 1}'),('[1, "x"]'),('null')"""),
        ("a int4range", "('[1,5)'),('empty')"),
        ("a mood", "('sad'),('happy'),('ok')"),
        ("a positive", "(1),(2),(30)"),
        ('a "sh op"."odd ""type"', "(1),(2)"),
        ("a int, b text", "(1,'b'),(1,'a'),(0,'z'),(2,''),(1,'c')"),
        (
            "a mood, b uuid, c date",
            "('ok', gen_random_uuid(), '2024-01-01'),"
            "('sad', gen_random_uuid(), '2024-01-01'),('ok', gen_random_uuid(), '2023-01-01')",
        ),
    ],
)
def test_kinds_of_keys(
    dsn: str, db: Database, hub: Hub, recorder: Recorder, types: str, keys: str
) -> None:
    """Whatever the key's type, all rows come in its order, with the key that an update has."""
    db("CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy'); CREATE DOMAIN positive AS int")
    db('CREATE SCHEMA "sh op"; CREATE DOMAIN "sh op"."odd ""type" AS numeric')
    names = ", ".join(part.split()[0] for part in types.split(", "))
    db(f"CREATE TABLE kinds ({types}, PRIMARY KEY ({names}), n int)")
    db(f"INSERT INTO kinds VALUES {keys}")
    db(
        f"UPDATE kinds AS k SET n = o.n FROM (SELECT row_number() OVER (ORDER BY {names}) AS n,"
        f" {names} FROM kinds) AS o WHERE ({', '.join('k.' + c for c in names.split(', '))}) ="
        f" ({', '.join('o.' + c for c in names.split(', '))})"
    )
    [(count,)] = db("SELECT count(*) FROM kinds")
    hub.on("kinds")(recorder)
    hub.start(dsn, [pgsignals.watch("kinds", extra=["n"])], delivery="outbox", name="mailer")
    # One row at a time, so that each key is the start of a chunk.
    assert hub.backfill("kinds", chunk=1).wait(DEADLINE)
    events = recorder.wait(count)
    assert [event.values["n"] for event in events] == list(range(1, count + 1))
    db("UPDATE kinds SET n = n + 0")
    changes = recorder.wait(2 * count)[count:]
    by_n = {event.values["n"]: event for event in changes}
    assert [repr(key_of(event)) for event in events] == [
        repr(key_of(by_n[event.values["n"]])) for event in events
    ]


@pytest.mark.parametrize("workers", [1, 4])
def test_what_comes_last_is_the_newest(
    dsn: str, db: Database, hub: Hub, connect: Callable[[str], Database], workers: int
) -> None:
    """Beside writers of all kinds, a snapshot tells what the events before it have led to.

    At the end, each record's last event is what the table has.
    """
    latest: dict[int, str | None] = {}
    snapshots: list[int] = []
    wrong: list[tuple[object, ...]] = []

    @hub.on("users")
    def receive(event: pgsignals.Event) -> None:
        if event.op == "snapshot":
            snapshots.append(event.id)
            known = latest.get(event.id, event.values["name"])
            if known != event.values["name"]:
                wrong.append((event.id, known, event.values["name"]))
        latest[event.id] = None if event.op == "deleted" else event.values["name"]

    hub.start(
        dsn,
        [pgsignals.watch("users", extra=["name"])],
        delivery="outbox",
        name="mailer",
        workers=workers,
    )
    ending = threading.Event()
    failed: list[BaseException] = []

    def write(seed: int) -> None:
        chance = random.Random(seed)
        own = connect(dsn)
        number = 0
        while not ending.is_set():
            number += 1
            key = chance.randint(1, 600)
            text = f"{seed}-{number}"
            statement = chance.choice(
                [
                    "UPDATE users SET name = %(text)s WHERE id = %(key)s",
                    "UPDATE users SET name = %(text)s WHERE id BETWEEN %(key)s AND %(key)s + 5",
                    "INSERT INTO users VALUES (%(key)s, %(text)s)"
                    " ON CONFLICT (id) DO UPDATE SET name = excluded.name",
                    "DELETE FROM users WHERE id = %(key)s",
                ]
            )
            try:
                own("BEGIN")
                own(statement, {"text": text, "key": key})
                if chance.random() < 0.3:
                    own(statement, {"text": text + "b", "key": chance.randint(1, 600)})
                own(chance.choice(["COMMIT", "COMMIT", "ROLLBACK"]))
            except psycopg2.errors.DeadlockDetected:
                own("ROLLBACK")
            except BaseException as error:
                failed.append(error)
                return

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for each in writers:
        each.start()
    try:
        for _ in range(8):
            assert hub.backfill("users", chunk=20).wait(60)
    finally:
        ending.set()
        for each in writers:
            each.join()
    assert not failed
    settle(hub, 30)
    assert len(snapshots) > 2000
    assert not wrong
    table: dict[int, str | None] = dict(db("SELECT id, name FROM users"))
    assert {key: name for key, name in latest.items() if name is not None} == table


def test_a_table_without_a_key(dsn: str, db: Database, hub: Hub) -> None:
    """There is no order to go by: the error says so."""
    db("CREATE TABLE logs (line text)")
    hub.on("logs")(print)
    hub.start(dsn, ["logs"], delivery="outbox", name="mailer")
    with pytest.raises(pgsignals.TableError, match="primary key"):
        hub.backfill("logs")


def test_what_cannot_be_backfilled(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """Each wrong call is an error that says what would be right."""
    with pytest.raises(pgsignals.StateError, match="start"):
        hub.backfill("users")
    with hub.start(dsn, ["users"]), pytest.raises(ConfigurationError, match="outbox"):
        hub.backfill("users")
    with (
        hub.start(dsn, ["users"], delivery="outbox"),
        pytest.raises(ConfigurationError, match="nam"),
    ):
        hub.backfill("users")
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    with pytest.raises(ConfigurationError, match="no receiver listens"):
        hub.backfill("users")
    hub.on("users", "snapshot")(recorder)
    with pytest.raises(ConfigurationError, match="did you mean 'users'"):
        hub.backfill("usres")
    with pytest.raises(ConfigurationError, match=r"column \"nme\" does not exist at character 1"):
        hub.backfill("users", where="nme = 'x'")
    with pytest.raises(ConfigurationError, match="boolean"):
        hub.backfill("users", where="id")
    with pytest.raises(ConfigurationError, match="chunk=0"):
        hub.backfill("users", chunk=0)
    with pytest.raises(ConfigurationError, match="'mailer'"):
        hub.backfill("users", name="mailer/kafka")
    assert db("SELECT * FROM pgsignals.backfills") == []


def test_a_receiver_of_snapshots_needs_outbox_delivery(
    dsn: str, hub: Hub, recorder: Recorder
) -> None:
    """By NOTIFY nothing delivers a snapshot: start says what would."""
    hub.on("users", "snapshot")(recorder)
    with pytest.raises(pgsignals.ReceiverError, match=r'delivery="outbox" and name='):
        hub.start(dsn, ["users"])


def test_wide_rows(dsn: str, db: Database, hub: Hub) -> None:
    """However long rows are, no more than a few MiB of them are with receivers at once."""
    db("CREATE TABLE files (id int PRIMARY KEY, body text)")
    db("INSERT INTO files SELECT n, repeat(md5(n::text), 16384) FROM generate_series(1, 100) AS n")
    waiting: list[int] = []
    seen: list[tuple[int, int]] = []

    @hub.on("files")
    def receive(event: pgsignals.Event) -> None:
        waiting.append(hub.health().depth)
        seen.append((event.id, len(event.values["body"])))

    hub.start(dsn, [pgsignals.watch("files", extra=["body"])], delivery="outbox", name="mailer")
    assert hub.backfill("files").wait(DEADLINE)
    assert seen == [(n, 524_288) for n in range(1, 101)]
    assert max(waiting) <= 20


@pytest.mark.parametrize("kind", ["partitioned", "inherited"])
def test_partitioned_tables(
    dsn: str, db: Database, hub: Hub, recorder: Recorder, kind: str
) -> None:
    """All rows of a partitioned table come; those of tables that inherit are not the parent's."""
    if kind == "partitioned":
        db("CREATE TABLE logs (id int PRIMARY KEY) PARTITION BY HASH (id)")
        for n in range(3):
            values = f"WITH (MODULUS 3, REMAINDER {n})"
            db(f"CREATE TABLE logs_{n} PARTITION OF logs FOR VALUES {values}")
        db("INSERT INTO logs SELECT generate_series(1, 300)")
    else:
        db("CREATE TABLE logs (id int PRIMARY KEY)")
        db("CREATE TABLE special (PRIMARY KEY (id)) INHERITS (logs)")
        db("INSERT INTO logs SELECT generate_series(1, 300)")
        db("INSERT INTO special SELECT generate_series(1, 10)")
    hub.on("logs", "snapshot")(recorder)
    hub.start(dsn, ["logs"], delivery="outbox", name="mailer")
    backfill = hub.backfill("logs", chunk=10)
    assert backfill.total == 300
    assert backfill.wait(DEADLINE)
    assert [event.id for event in recorder.items] == list(range(1, 301))


def test_one_table_for_several_models(dsn: str, db: Database, hub: Hub, recorder: Recorder) -> None:
    """Of single-table inheritance, a model's backfill delivers its own rows."""

    class Base(DeclarativeBase):
        pass

    class Staff(Base):
        __tablename__ = "staff"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        __mapper_args__: ClassVar = {"polymorphic_on": "kind", "polymorphic_identity": "staff"}

    class Manager(Staff):
        __mapper_args__: ClassVar = {"polymorphic_identity": "manager"}

    db("CREATE TABLE staff (id int PRIMARY KEY, kind text)")
    db("INSERT INTO staff VALUES (1, 'staff'), (2, 'manager'), (3, 'staff'), (4, 'manager')")
    everybody = Recorder()
    hub.on(Manager, "snapshot")(recorder)
    hub.on(Staff, "snapshot")(everybody)
    hub.start(dsn, [Staff, Manager], delivery="outbox", name="mailer")
    assert hub.backfill(Manager).wait(DEADLINE)
    assert [(event.model, event.id) for event in recorder.items] == [(Manager, 2), (Manager, 4)]
    assert not everybody.items
    assert hub.backfill(Staff).wait(DEADLINE)
    assert [event.id for event in everybody.items] == [1, 2, 3, 4]


def test_other_receivers(dsn: str, hub: Hub, recorder: Recorder) -> None:
    """Batches, streams and blinker's signals get snapshots too."""
    batches = Recorder()
    hub.on_batch("users", every=0.1)(batches)

    def connected(sender: object, event: pgsignals.Event) -> None:
        recorder(event)

    hub.signal("users", "snapshot").connect(connected)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    with hub.stream("users", maxsize=1000) as events:
        assert hub.backfill("users").wait(DEADLINE)
        assert [next(events).id for _ in range(500)] == list(range(1, 501))
    assert len(recorder.items) == 500
    assert [key for batch in batches.items for key in batch.ids] == list(range(1, 501))


def test_the_parts_of_bytea_keys() -> None:
    """A record is in the same part whatever the address of its key."""
    keys = [(memoryview(b"key"), 1) for _ in range(50)]
    assert len({part_of(key, 64) for key in keys}) == 1


def test_a_database_of_any_bytes(server: Server, hub: Hub, recorder: Recorder) -> None:
    """In SQL_ASCII, keys that are not UTF-8 are gone through, whatever names and conditions are."""
    name = f"ascii_{uuid.uuid4().hex[:8]}"
    with closing(psycopg2.connect(server.dsn())) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(f"CREATE DATABASE {name} ENCODING SQL_ASCII TEMPLATE template0 LOCALE 'C'")
    dsn = server.dsn(name)
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        connection.set_client_encoding("UTF8")
        cursor.execute("CREATE TABLE words (word text PRIMARY KEY)")
        cursor.execute('CREATE TABLE "wörter€" (word text PRIMARY KEY)')
        cursor.execute("""INSERT INTO "wörter€" VALUES ('a')""")
        cursor.execute(r"INSERT INTO words VALUES ('a'), (E'caf\351'), (E'caf\303\251'), ('z')")
    hub.on("words")(recorder)
    hub.on("wörter€")(recorder)
    hub.start(dsn, ["words", "wörter€"], delivery="outbox", name="mailer")
    assert hub.backfill("words", chunk=1).wait(DEADLINE)
    assert [event.id for event in recorder.items] == [
        "a",
        "café",
        "caf\N{REPLACEMENT CHARACTER}",
        "z",
    ]
    assert len({event.uid for event in recorder.items}) == 4
    assert hub.backfill("words", where="word <> '€' AND word <> 'café'").wait(DEADLINE)
    assert [event.id for event in recorder.items[4:]] == [
        "a",
        "caf\N{REPLACEMENT CHARACTER}",
        "z",
    ]
    assert hub.backfill("wörter€").wait(DEADLINE)
    assert recorder.items[-1].table == "wörter€"


def test_each_version(each_dsn: str, each_db: Database, hub: Hub, recorder: Recorder) -> None:
    """On the oldest and the newest PostgreSQL, with a key of two columns and a condition."""
    each_db("CREATE TABLE visits (site text, n int, at timestamptz, PRIMARY KEY (site, n))")
    each_db(
        "INSERT INTO visits SELECT 'site ' || n % 3, n, '2024-01-01 12:00+01'"
        " FROM generate_series(1, 600) AS n"
    )
    hub.on("visits", "snapshot")(recorder)
    watcher = pgsignals.watch("visits", extra=["at"])
    hub.start(each_dsn, [watcher], delivery="outbox", name="mailer")
    assert hub.backfill("visits", where="n > 300", chunk=7).wait(DEADLINE)
    assert [event.id for event in recorder.items] == each_db(
        "SELECT site, n FROM visits WHERE n > 300 ORDER BY site, n"
    )
    assert recorder.items[0].values["at"] == datetime(2024, 1, 1, 11, tzinfo=timezone.utc)
