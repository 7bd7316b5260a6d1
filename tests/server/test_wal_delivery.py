"""Delivery from the write-ahead log, as a consumer without troubles of its slot sees it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from decimal import Decimal
from typing import Any

import psycopg2
import psycopg2.extensions
import psycopg2.extras
import pytest
from psycopg2 import sql

import pgsignals
from pgsignals.testing import EventLog, Server
from pgsignals.wal.log import WalLog
from tests.broadcasters import Broker
from tests.conftest import DEADLINE, Database, Recorder
from tests.forked import Forked
from tests.waiting import eventually, settle
from tests.wal import (
    check_deliveries,
    disconnect,
    end_readers,
    gaps,
    slots,
    start,
    until_saved,
)


@pytest.fixture
def shop(each_dsn: str, connect: Callable[[str], Database]) -> Database:
    """A database with a table."""
    db = connect(each_dsn)
    db("CREATE TABLE items (id bigint PRIMARY KEY, name text, n int NOT NULL DEFAULT 0)")
    return db


@pytest.fixture
def another() -> Iterator[Callable[[], pgsignals.Hub]]:
    """Makes further Hubs, as other processes have."""
    made: list[pgsignals.Hub] = []

    def make() -> pgsignals.Hub:
        made.append(pgsignals.Hub())
        return made[-1]

    yield make
    for each in made:
        each.stop()


def is_item(number: int) -> Callable[[Any], bool]:
    """Whether something that came is an event of that item."""
    return lambda each: getattr(each, "id", None) == number


def test_without_a_name_nothing_stays(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """A consumer without a name has a temporary slot, and leaves nothing behind."""
    hub.on("items")(recorder)
    start(hub, shop.dsn, name=None)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    assert slots(shop, "temporary", "active") == [(True, True)]
    assert hub.stop()
    eventually(lambda: slots(shop), lambda found: found == [])
    assert shop("SELECT name FROM pgsignals.consumers") == []


def test_without_a_name_a_killed_process_has_no_slot(shop: Database) -> None:
    """Nor does a process that is killed leave one, which would keep the server's log."""
    program = (
        "import os, time, pgsignals\n"
        "pgsignals.start(os.environ['PGSIGNALS_DSN'], ['items'], delivery='wal')\n"
        "print('started', flush=True)\n"
        "pgsignals.run()\n"
    )
    process = Forked("-c", program, dsn=shop.dsn)
    assert process.out() == "started"
    assert slots(shop, "temporary") == [True]
    process.process.kill()
    process.process.wait()
    eventually(lambda: slots(shop), lambda found: found == [])


def test_without_a_name_a_reconnect_is_a_gap(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """What was committed while it was away is announced; its first start announces nothing."""
    hub.on("items")(recorder)
    hub.on_gap(recorder)
    shop("INSERT INTO items VALUES (0)")
    start(hub, shop.dsn, name=None)
    shop("INSERT INTO items VALUES (1)")
    [event] = recorder.wait(1)
    assert event.id == 1
    disconnect(shop)
    shop("INSERT INTO items VALUES (2)")
    eventually(lambda: hub.status().reconnects, lambda count: count > 0)
    shop("INSERT INTO items VALUES (3)")
    found = recorder.wait_until(is_item(3))
    [gap] = gaps(found)
    assert gap.since <= found[-1].at
    assert len(slots(shop)) == 1


def test_with_a_name_it_goes_on(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """What is committed while nobody of the name runs, or reads, comes afterwards, once."""
    hub.on("items", "inserted")(recorder)
    hub.on_gap(recorder)
    start(hub, shop.dsn)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    assert hub.stop()
    shop("INSERT INTO items SELECT generate_series(2, 5000)")
    start(hub, shop.dsn)
    assert [event.id for event in recorder.wait(5000)] == [*range(1, 5001)]
    settle(hub)
    disconnect(shop)
    shop("INSERT INTO items SELECT generate_series(5001, 6000)")
    recorder.wait_until(is_item(6000))
    assert gaps(recorder.items) == []
    # Whether what lay there at the reconnect had been delivered before, nobody knows.
    assert [*dict.fromkeys(event.id for event in recorder.items)] == [*range(1, 6001)]
    assert len({event.uid for event in recorder.items}) == 6000


def test_a_transaction_longer_than_a_page(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """Interrupted in its middle, it goes on there: nothing is lost, turned or named anew."""
    rows = 20_000
    passed, gate = threading.Event(), threading.Event()

    @hub.on("items", "updated")
    def receive(event: pgsignals.Event) -> None:
        recorder(event)
        if len(recorder.items) >= 5000 and not gate.is_set():
            passed.set()
            assert gate.wait(DEADLINE)

    hub.on_gap(recorder)
    shop("INSERT INTO items SELECT generate_series(0, 9)")
    start(hub, shop.dsn, pgsignals.watch("items", "updated", extra=["n"]))
    shop(
        "DO $$ BEGIN FOR i IN 1.."
        f"{rows} LOOP UPDATE items SET n = i WHERE id = i % 10; END LOOP; END $$"
    )
    assert passed.wait(DEADLINE)
    within = "SELECT messages FROM pgsignals.consumers WHERE messages > 0"
    eventually(lambda: shop(within), bool)
    disconnect(shop)
    # Until it has noticed that, it delivers what it has read.
    eventually(lambda: hub.status().reconnects, bool)
    gate.set()
    recorder.wait_until(lambda event: event.values["n"] == rows)
    assert gaps(recorder.items) == []
    check_deliveries(recorder.items, "n")
    assert {event.values["n"] for event in recorder.items} == {*range(1, rows + 1)}
    # It went on in the middle of the transaction, and not at its beginning.
    assert len(recorder.items) < rows + 5000


def test_the_order_of_transactions_over_watchers(
    hub: pgsignals.Hub, another: Callable[[], pgsignals.Hub], shop: Database, recorder: Recorder
) -> None:
    """Events of single rows come as their transactions committed, whatever watcher has them."""
    watchers = [
        pgsignals.watch("items", "inserted", label="some"),
        pgsignals.watch("items", "inserted", "updated", label="more", extra=["n"]),
    ]
    away = another()
    start(away, shop.dsn, *watchers)
    away.stop()
    for number in range(1, 4):
        shop(f"INSERT INTO items VALUES ({number}, 'a', {number})")
    shop("UPDATE items SET n = 9 WHERE id = 1")
    shop("INSERT INTO items VALUES (4, 'a', 4), (5, 'a', 5)")
    hub.subscribe(recorder, "some")
    hub.subscribe(recorder, "more")
    start(hub, shop.dsn, *watchers)
    recorder.wait(11)
    by_transaction: dict[int, set[tuple[Any, ...]]] = {}
    for each in recorder.items:
        by_transaction.setdefault(each.txid, set()).add((each.label, each.op, each.id))
    assert [each.txid for each in recorder.items] == sorted(each.txid for each in recorder.items)
    both = ("some", "more")
    assert [*by_transaction.values()] == [
        *({(label, "inserted", number) for label in both} for number in range(1, 4)),
        {("more", "updated", 1)},
        {(label, "inserted", number) for label in both for number in (4, 5)},
    ]
    assert len({each.position for each in recorder.items}) == 5


def test_nothing_from_a_rollback(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """Transactions and savepoints that are rolled back give no event."""
    hub.on("items")(recorder)
    start(hub, shop.dsn)
    shop("BEGIN; INSERT INTO items VALUES (1); ROLLBACK")
    shop(
        "BEGIN; INSERT INTO items VALUES (2); SAVEPOINT s; INSERT INTO items VALUES (3);"
        " ROLLBACK TO s; INSERT INTO items VALUES (4); COMMIT"
    )
    settle(hub)
    assert [event.id for event in recorder.items] == [2, 4]


def test_prepared_transactions(
    hub: pgsignals.Hub, connect: Callable[[str], Database], recorder: Recorder, each_version: int
) -> None:
    """What is prepared comes when it is committed, and never if it is rolled back."""
    settings = {
        "wal_level": "logical",
        "max_slot_wal_keep_size": "1GB",
        "max_prepared_transactions": "5",
    }
    with Server(each_version, settings) as server:
        db = connect(server.create_database())
        db("CREATE TABLE items (id bigint PRIMARY KEY)")
        hub.on("items")(recorder)
        start(hub, db.dsn)
        for number, name in ((1, "kept"), (2, "not")):
            db(f"BEGIN; INSERT INTO items VALUES ({number}); PREPARE TRANSACTION '{name}'")
        db("INSERT INTO items VALUES (3)")
        recorder.wait(1)
        db("COMMIT PREPARED 'kept'")
        db("ROLLBACK PREPARED 'not'")
        db("INSERT INTO items VALUES (4)")
        assert [event.id for event in recorder.wait(3)] == [3, 1, 4]
        hub.stop()


FORGERIES = {
    "junk": "'no message of ours'",
    "empty": "''",
    "the parts of one": "'1 2 3 4 5 6'",
    "another secret": '\'123456789012345678 1 1 {"t":1,"x":1}\n[1]\'',
    "numbers that are none": "'123456789012345678 x y {}'",
    "huge": "repeat('9', 20000000)",
    "bytes": "'\\x00ff00'::bytea",
}


def test_forged_messages(
    hub: pgsignals.Hub,
    shop: Database,
    connect: Callable[[str], Database],
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a role without rights writes under our prefix is counted, and logged once."""
    shop("CREATE ROLE nobody_at_all LOGIN")
    try:
        forger = connect(shop.dsn.replace("postgres@", "nobody_at_all@"))
        hub.on("items")(recorder)
        hub.on_gap(recorder)
        start(hub, shop.dsn)
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            forger("SELECT last_value FROM pgsignals.wal_secret")
        for transactional in (True, False):
            for forged in FORGERIES.values():
                forger(
                    f"SELECT pg_logical_emit_message({transactional}, 'pgsignals', {forged}),"
                    f" pg_logical_emit_message({transactional}, 'others', {forged})"
                )
        shop("INSERT INTO items VALUES (1)")
        settle(hub)
        assert [event.id for event in recorder.items] == [1]
        assert hub.status().invalid == len(FORGERIES)
        told = [each for each in caplog.records if "none of our triggers" in each.getMessage()]
        assert len(told) == 1
        forger.connection.close()
    finally:
        shop("DROP ROLE nobody_at_all")


def test_the_secret_itself_with_junk(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """A message with the secret, of no channel of ours or of no form, stops nothing."""
    hub.on("items")(recorder)
    start(hub, shop.dsn)
    for junk in ("", "1", "1 2", "1 2 {}", "x y {}", f"{2**80} {2**80} junk"):
        shop(
            "SELECT pg_logical_emit_message(true, 'pgsignals', last_value || ' ' || %s)"
            " FROM pgsignals.wal_secret",
            (junk,),
        )
    shop("INSERT INTO items VALUES (1)")
    settle(hub)
    assert [event.id for event in recorder.items] == [1]
    assert hub.status().reconnects == 0


SECRET_LOST = {
    "no value": (
        "ALTER SEQUENCE pgsignals.wal_secret RESTART",
        "SELECT setval('pgsignals.wal_secret', 987654321)",
    ),
    "no sequence": (
        "ALTER SEQUENCE pgsignals.wal_secret RENAME TO elsewhere",
        "ALTER SEQUENCE pgsignals.elsewhere RENAME TO wal_secret",
    ),
}


@pytest.mark.parametrize("how", SECRET_LOST)
def test_without_the_secret(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, how: str
) -> None:
    """The write succeeds, and a Gap says that its event is missing; then events go on."""
    take, give = SECRET_LOST[how]
    hub.on("items", "inserted")(recorder)
    hub.on_gap(recorder)
    start(hub, shop.dsn, capture="messages")
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    shop(take)
    shop("INSERT INTO items VALUES (2)")
    found = recorder.wait_until(lambda each: isinstance(each, pgsignals.Gap))
    assert [each.id for each in found[:-1]] == [1]
    shop(give)
    shop("INSERT INTO items VALUES (3)")
    recorder.wait_until(is_item(3))
    assert shop("SELECT count(*) FROM items") == [(3,)]


def test_without_a_right_on_the_secret(
    hub: pgsignals.Hub, shop: Database, connect: Callable[[str], Database], recorder: Recorder
) -> None:
    """A trigger whose owner may not read the secret lets the write succeed, and a Gap says so."""
    [(database,)] = shop("SELECT current_database()")
    owner = f"owner_{database}"
    shop(f"CREATE ROLE {owner} LOGIN; ALTER DATABASE {database} OWNER TO {owner}")
    try:
        shop(f"ALTER TABLE items OWNER TO {owner}; GRANT CREATE ON SCHEMA public TO {owner}")
        hub.on("items", "inserted")(recorder)
        hub.on_gap(recorder)
        owned = shop.dsn.replace("postgres@", f"{owner}@")
        start(hub, owned, listen_dsn=shop.dsn, capture="messages")
        shop("INSERT INTO items VALUES (1)")
        recorder.wait(1)
        shop(f"REVOKE ALL ON SEQUENCE pgsignals.wal_secret FROM {owner}")
        shop("INSERT INTO items VALUES (2)")
        recorder.wait_until(lambda each: isinstance(each, pgsignals.Gap))
        shop(f"GRANT ALL ON SEQUENCE pgsignals.wal_secret TO {owner}")
        shop("INSERT INTO items VALUES (3)")
        recorder.wait_until(is_item(3))
        assert 2 not in [getattr(each, "id", None) for each in recorder.items]
        hub.stop()
    finally:
        shop(f"ALTER DATABASE {database} OWNER TO postgres")
        shop(f"DROP OWNED BY {owner} CASCADE; DROP ROLE {owner}")


def test_another_secret(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """Of a secret that is set anew while the Hub runs, no event is taken for forged."""
    hub.on("items")(recorder)
    start(hub, shop.dsn, capture="messages")
    shop("INSERT INTO items VALUES (1)")
    shop("SELECT setval('pgsignals.wal_secret', 123123123)")
    shop("INSERT INTO items VALUES (2)")
    settle(hub)
    assert [event.id for event in recorder.items] == [1, 2]


@pytest.mark.parametrize(
    "how",
    [
        "SELECT setval('pgsignals.wal_secret', 987654321)",
        # The next start of whoever installs puts a value there.
        "ALTER SEQUENCE pgsignals.wal_secret RESTART",
    ],
    ids=["another", "none"],
)
def test_another_secret_while_it_is_down(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, how: str
) -> None:
    """What triggers have written with the former secret lies in a Gap, which is told once."""
    hub.on("items", "inserted")(recorder)
    hub.on_gap(recorder)
    start(hub, shop.dsn, capture="messages")
    shop("INSERT INTO items VALUES (1)")
    until_saved(shop)
    assert hub.stop()
    shop("INSERT INTO items VALUES (2)")
    [(lost_at,)] = shop("SELECT clock_timestamp()")
    shop(how)
    start(hub, shop.dsn, capture="messages")
    shop("INSERT INTO items VALUES (3)")
    told = gaps(recorder.wait_until(is_item(3)))
    assert any(gap.since < lost_at < gap.until for gap in told)
    settle(hub)
    assert hub.stop()
    start(hub, shop.dsn, capture="messages")
    shop("INSERT INTO items VALUES (4)")
    assert gaps(recorder.wait_until(is_item(4))) == told


def test_two_databases_with_one_name(
    hub: pgsignals.Hub,
    shop: Database,
    each_server: Server,
    connect: Callable[[str], Database],
    recorder: Recorder,
    another: Callable[[], pgsignals.Hub],
) -> None:
    """Consumers of one name in two databases of a server each have their own slot and events."""
    other, received = another(), Recorder()
    second = connect(each_server.create_database())
    second("CREATE TABLE items (id bigint PRIMARY KEY)")
    hub.on("items")(recorder)
    other.on("items")(received)
    start(hub, shop.dsn)
    start(other, second.dsn)
    shop("INSERT INTO items VALUES (1)")
    second("INSERT INTO items VALUES (2)")
    settle(hub)
    settle(other)
    assert [event.id for event in recorder.items] == [1]
    assert [event.id for event in received.items] == [2]
    assert len({*slots(shop), *slots(second)}) == 2


@pytest.mark.parametrize(
    ("encoding", "sent", "text"),
    [
        ("LATIN1", "'\\xe4f6fc'::bytea", "äöü"),
        ("SQL_ASCII", "'\\xc3a4'::bytea", "ä"),
        ("SQL_ASCII", "'\\xe441ff'::bytea", "\ufffdA\ufffd"),
        ("EUC_JP", "'\\xa4a2'::bytea", "あ"),
    ],
)
def test_other_encodings(
    hub: pgsignals.Hub,
    each_server: Server,
    connect: Callable[[str], Database],
    recorder: Recorder,
    encoding: str,
    sent: str,
    text: str,
) -> None:
    """Texts come as the same characters, whatever the database's encoding; others are marked."""
    name = f"db_{encoding.lower()}_{len(text)}"
    statement = sql.SQL("CREATE DATABASE {} ENCODING {} TEMPLATE template0")
    with closing(psycopg2.connect(each_server.dsn())) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement.format(sql.Identifier(name), sql.Literal(encoding)))
    db = connect(each_server.dsn(name))
    db("CREATE TABLE items (id bigint PRIMARY KEY, name text)")
    hub.on("items")(recorder)
    start(hub, db.dsn, pgsignals.watch("items", extra=["name"]))
    db(f"INSERT INTO items VALUES (1, convert_from({sent}, '{encoding}'))")
    db("INSERT INTO items VALUES (2, 'plain')")
    settle(hub)
    assert [event.values["name"] for event in recorder.items] == [text, "plain"]
    hub.stop()
    end_readers(db)
    db.connection.close()
    with closing(psycopg2.connect(each_server.dsn())) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_status_and_settle(hub: pgsignals.Hub, shop: Database) -> None:
    """Settling waits for what is committed by now; the status has the consumer, without a lag."""
    start(hub, shop.dsn)
    with EventLog(hub) as log:
        for number in range(1, 21):
            shop("INSERT INTO items VALUES (%s)", (number,))
            assert len(log.all("items", timeout=DEADLINE)) == number
        log.none("items", "deleted", timeout=DEADLINE)

    def lag() -> Any:
        outbox = hub.status().outbox
        assert outbox is not None
        [consumer] = outbox.consumers
        return consumer.name, consumer.lag

    eventually(lag, lambda found: found == ("mailer", 0))
    assert hub.health().ready
    assert hub.status().active


def test_a_backfill_among_changes(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """The last that comes of each record is its last state, however its changes and chunks meet."""
    shop("INSERT INTO items SELECT generate_series(1, 200)")
    hub.on("items", "updated", "snapshot")(recorder)
    start(hub, shop.dsn, pgsignals.watch("items", extra=["n"]))
    ending = threading.Event()

    def write() -> None:
        with closing(psycopg2.connect(shop.dsn)) as connection:
            while not ending.is_set():
                with connection, connection.cursor() as cursor:
                    cursor.execute("UPDATE items SET n = n + 1 WHERE id % 7 = txid_current() % 7")

    writers = [threading.Thread(target=write) for _ in range(3)]
    for each in writers:
        each.start()
    try:
        assert hub.backfill("items", chunk=5).wait(DEADLINE)
    finally:
        ending.set()
        for each in writers:
            each.join(DEADLINE)
    settle(hub)
    last = {event.id: event.values["n"] for event in recorder.items}
    assert last == dict(shop("SELECT id, n FROM items"))
    snapshots = [event.id for event in recorder.items if event.op == "snapshot"]
    assert sorted(snapshots) == [*range(1, 201)]


def test_a_dead_letter_outlives_its_process(
    hub: pgsignals.Hub, shop: Database, another: Callable[[], pgsignals.Hub], recorder: Recorder
) -> None:
    """It is delivered by the next process as it was, when the log does not have it any more."""
    failing = threading.Event()
    failing.set()

    def listen(to: pgsignals.Hub) -> None:
        @to.on("items", "inserted", retries=0)
        def receive(event: pgsignals.Event) -> None:
            if failing.is_set():
                raise ValueError("poison")
            recorder(event)

    listen(hub)
    items = pgsignals.watch("items", "inserted", extra=["name"])
    start(hub, shop.dsn, items)
    shop("INSERT INTO items SELECT g, 'item ' || g FROM generate_series(1, 3) AS g")
    eventually(lambda: shop("SELECT count(*) FROM pgsignals.dead_letters"), lambda n: n == [(3,)])
    until_saved(shop)
    uids = [uid for (uid,) in shop("SELECT uid FROM pgsignals.dead_letters ORDER BY id")]
    assert hub.stop()
    failing.clear()
    later = another()
    listen(later)
    start(later, shop.dsn, items)
    shop("UPDATE pgsignals.dead_letters SET retry = true")
    shop("NOTIFY pgsignals_wake, 'redeliver'")
    events = sorted(recorder.wait(3), key=lambda event: event.id)
    assert [event.uid for event in events] == uids
    assert [event.values["name"] for event in events] == ["item 1", "item 2", "item 3"]
    assert all(event.redelivered for event in events)
    eventually(lambda: shop("SELECT count(*) FROM pgsignals.dead_letters"), lambda n: n == [(0,)])


def test_parked_events_outlive_their_process(
    hub: pgsignals.Hub, shop: Database, another: Callable[[], pgsignals.Hub], recorder: Recorder
) -> None:
    """What is kept for a receiver that hangs comes from the next process, as it was, in order."""
    hanging, gate, others = threading.Event(), threading.Event(), Recorder()
    hanging.set()

    def listen(to: pgsignals.Hub) -> None:
        @to.on("items", "updated")
        def hangs(event: pgsignals.Event) -> None:
            if hanging.is_set():
                gate.wait(2 * DEADLINE)
            else:
                recorder(event)

        to.on("items", "updated")(others)

    listen(hub)
    items = pgsignals.watch("items", "updated", extra=["n"])
    shop("INSERT INTO items SELECT generate_series(1, 10)")
    start(hub, shop.dsn, items, workers=4, queue_size=20)
    for n in range(1, 9):
        shop("UPDATE items SET n = %s", (n,))
    others.wait(80)
    until_saved(shop)
    eventually(lambda: shop("SELECT count(*) FROM pgsignals.parked"), lambda n: n == [(80,)])
    hub.stop(0.5)
    hanging.clear()
    later = another()
    listen(later)
    start(later, shop.dsn, items)
    events = recorder.wait(80)
    check_deliveries(events, "n")
    assert {(event.id, event.values["n"]) for event in events} == {
        (number, n) for number in range(1, 11) for n in range(1, 9)
    }
    eventually(lambda: shop("SELECT count(*) FROM pgsignals.parked"), lambda n: n == [(0,)])
    gate.set()


def test_a_receiver_that_hangs_costs_little(
    hub: pgsignals.Hub, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nobody takes what has been read, the log is polled some times a second; then all comes.

    It was polled each 4 milliseconds.
    """
    polled, poll = Recorder(), WalLog.poll

    def noted(self: WalLog) -> Any:
        polled(time.monotonic())
        return poll(self)

    monkeypatch.setattr(WalLog, "poll", noted)
    gate, entered, received = threading.Event(), threading.Event(), Recorder()

    @hub.on("items", "inserted")
    def hangs(event: pgsignals.Event) -> None:
        entered.set()
        assert gate.wait(2 * DEADLINE)
        received(event.id)

    start(hub, shop.dsn, queue_size=10)
    shop("INSERT INTO items SELECT generate_series(1, 5000)")
    assert entered.wait(DEADLINE)
    try:
        # The first of them come before the pauses are long.
        latest = polled.wait(len(polled.items) + 50)[-10:]
        assert latest[-1] - latest[0] > 0.9
    finally:
        gate.set()
    assert received.wait(5000) == [*range(1, 5001)]


def test_a_broker_has_its_own_slot(
    hub: pgsignals.Hub, shop: Database, another: Callable[[], pgsignals.Hub], recorder: Recorder
) -> None:
    """While it is away receivers go on, and the server may forget what they had; it gets all."""
    broker = Broker()
    broker.away.set()
    hub.on("items", "inserted")(recorder)
    start(hub, shop.dsn, backends=[broker])
    shop("INSERT INTO items SELECT generate_series(1, 500)")
    assert [event.id for event in recorder.wait(500)] == [*range(1, 501)]
    assert broker.refused.wait(DEADLINE)
    assert len(slots(shop)) == 2
    until_saved(shop)
    positions = "SELECT name, lsn FROM pgsignals.consumers ORDER BY lsn DESC"
    [(first, far), (second, near)] = shop(positions)
    assert first == "mailer"
    assert second.startswith("mailer/")
    assert far > near
    broker.away.clear()
    assert [event.id for event in broker.acknowledged.wait(500)] == [*range(1, 501)]
    until_saved(shop, second)


FORKS = """
import gc, os, sys
import pgsignals

name = sys.argv[1] or None

@pgsignals.on("items")
def receive(event):
    print(event.id, flush=True)

pgsignals.on_gap(lambda gap: print("gap", flush=True))
pgsignals.start(os.environ["PGSIGNALS_DSN"], ["items"], delivery="wal", name=name)
if (child := os.fork()) == 0:
    pgsignals.default_hub.stop()
    gc.collect()
    sys.exit(0)
os.waitpid(child, 0)
print("forked", flush=True)
pgsignals.run()
"""


@pytest.mark.parametrize("name", ["mailer", ""])
def test_a_fork(shop: Database, name: str) -> None:
    """The child's end does not end the parent's stream."""
    process = Forked("-c", FORKS, name, dsn=shop.dsn)
    assert process.out() == "forked"
    readers = slots(shop, "active_pid")
    for number in ("1", "2"):
        shop("INSERT INTO items VALUES (%s)", (number,))
        assert process.out() == number
    assert slots(shop, "active_pid") == readers
    process.process.terminate()
    assert process.end().code == 0


def test_a_wait_callback(hub: pgsignals.Hub, shop: Database) -> None:
    """Where psycopg2 waits as greenlets do, start() says that the log cannot be read, and why."""
    psycopg2.extensions.set_wait_callback(psycopg2.extras.wait_select)
    try:
        with pytest.raises(pgsignals.DatabaseError, match="wait callback"):
            start(hub, shop.dsn)
    finally:
        psycopg2.extensions.set_wait_callback(None)


def test_silence_and_context_of_rows_in_sql(
    hub: pgsignals.Hub, each_dsn: str, each_db: Database, recorder: Recorder
) -> None:
    """What docs/wal.md says to write in SQL holds for what follows in the transaction, alone."""
    each_db("CREATE TABLE items (id bigint PRIMARY KEY)")
    hub.on("items", "inserted")(lambda event: recorder((event.id, dict(event.context))))
    hub.start(each_dsn, ["items"], delivery="wal", capture="rows")
    on, off, told = (
        f"SELECT pg_logical_emit_message(true, 'pgsignals', '{text}')"
        for text in ("muted on", "muted off", 'context {"user": 7}')
    )
    each_db(
        f"BEGIN; INSERT INTO items VALUES (1); {on}; INSERT INTO items VALUES (2); {off}; {told};"
        "INSERT INTO items VALUES (3); COMMIT; INSERT INTO items VALUES (4)"
    )
    assert recorder.wait(3) == [(1, {}), (3, {"user": 7}), (4, {})]


def test_a_column_of_another_type_while_it_is_down(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """What was written before comes; of what fits the former type no longer, a Gap tells."""
    hub.on_gap(recorder)
    hub.on("items", "inserted")(lambda event: recorder((event.id, event.values["n"])))
    watcher = pgsignals.watch("items", "inserted", extra=["n"])
    options = {"delivery": "wal", "name": "mailer", "capture": "rows"}
    hub.start(shop.dsn, [watcher], **options)
    shop("INSERT INTO items (id, n) VALUES (1, 1)")
    recorder.wait(1)
    assert hub.stop()
    shop("INSERT INTO items (id, n) VALUES (2, 2)")
    shop("ALTER TABLE items ALTER n TYPE numeric")
    shop("INSERT INTO items (id, n) VALUES (3, 3.5)")
    hub.start(shop.dsn, [watcher], **options)
    shop("INSERT INTO items (id, n) VALUES (4, 4.5)")
    heard = recorder.wait_until(lambda each: each == (4, Decimal("4.5")))
    events = [each for each in heard if not isinstance(each, pgsignals.Gap)]
    assert events == [(1, 1), (2, 2), (4, Decimal("4.5"))]
    assert [each for each in heard if isinstance(each, pgsignals.Gap)]
