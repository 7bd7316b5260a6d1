"""A consumer that is started with another delivery than before, under the same name."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import pgsignals
from pgsignals import watch
from pgsignals.triggers.names import slot_name
from tests.broadcasters import Broker
from tests.conftest import DEADLINE, Database, Recorder
from tests.forked import Forked, run
from tests.waiting import eventually, settle
from tests.wal import gaps, slots

BOTH = [("outbox", "wal"), ("wal", "outbox")]
RECORDS = 12


@pytest.fixture
def shop(each_dsn: str, connect: Callable[[str], Database]) -> Database:
    """A database with a table of records, and what was committed of them."""
    db = connect(each_dsn)
    db("CREATE TABLE items (id bigint PRIMARY KEY, n int NOT NULL DEFAULT 0)")
    db("CREATE TABLE history (id bigint, n int)")
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


def start(hub: pgsignals.Hub, db: Database, delivery: str, **options: Any) -> pgsignals.Hub:
    options.setdefault("name", "mailer")
    return hub.start(db.dsn, ["items"], delivery=delivery, **options)


def reads(db: Database, name: str = "mailer") -> str:
    """The delivery in whose log the consumer has its position."""
    [(logged,)] = db(
        "SELECT DISTINCT lsn IS NOT NULL FROM pgsignals.consumers WHERE name = %s", (name,)
    )
    return "wal" if logged else "outbox"


def until_reads(db: Database, delivery: str, name: str = "mailer") -> None:
    """Wait until the consumer has its position in the log of a delivery."""
    eventually(lambda: reads(db, name), lambda found: found == delivery)


def triggers(db: Database) -> list[str]:
    """What serves the table now: triggers, and publications."""
    found = db(
        "SELECT 'trigger' FROM pg_trigger WHERE tgrelid = 'items'::regclass"
        " UNION SELECT pubname FROM pg_publication_tables WHERE tablename = 'items' ORDER BY 1"
    )
    return [each for (each,) in found]


@contextmanager
def writers(db: Database, count: int = 4) -> Iterator[None]:
    """Threads that update the records, and note in ``history`` what they commit.

    One of them has its transactions open for long, others roll some of theirs back.
    """
    db("INSERT INTO items SELECT generate_series(1, %s)", (RECORDS,))
    ended = threading.Event()
    failed: list[BaseException] = []

    def write(number: int) -> None:
        chance = random.Random(number)
        with psycopg2.connect(db.dsn) as connection, connection.cursor() as cursor:
            while not ended.is_set():
                # In one order, so that they do not die of deadlocks.
                for key in sorted(chance.sample(range(1, RECORDS + 1), chance.randint(1, 3))):
                    cursor.execute("UPDATE items SET n = n + 1 WHERE id = %s RETURNING n", (key,))
                    cursor.execute("INSERT INTO history VALUES (%s, %s)", (key, *cursor.fetchone()))
                ended.wait(0.2 if number == 0 else chance.uniform(0, 0.01))
                if chance.random() < 0.1:
                    connection.rollback()
                connection.commit()

    def try_to_write(number: int) -> None:
        try:
            write(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=try_to_write, args=(n,)) for n in range(count)]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        ended.set()
        for each in threads:
            each.join(DEADLINE)
    assert failed == []


def check(db: Database, told: list[tuple[int, int, str, bool]]) -> None:
    """Assert that what came, as key, ``n``, uid and mark, is what was committed.

    Nothing is lost or invented, each record's changes came in order, and what came again says so.
    """
    known: dict[tuple[int, int], str] = {}
    latest: dict[int, int] = {}
    for key, n, uid, again in told:
        if (key, n) in known:
            assert again, (key, n)
            assert known[key, n] == uid
            continue
        assert n > latest.get(key, 0), (key, n)
        known[key, n], latest[key] = uid, n
    assert set(known) == set(db("SELECT id, n FROM history"))


@pytest.mark.parametrize(("former", "later"), BOTH)
def test_what_is_left_comes_first(
    former: str, later: str, hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """What is left in the former delivery comes first, and nothing twice or as a Gap."""
    hub.on("items")(recorder)
    hub.on_gap(recorder)
    start(hub, shop, former)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    settle(hub)
    assert hub.stop()
    shop("INSERT INTO items SELECT generate_series(2, 3000)")
    start(hub, shop, later)
    until_reads(shop, later)
    shop("INSERT INTO items SELECT generate_series(3001, 5000)")
    settle(hub)
    assert gaps(recorder.items) == []
    assert [event.id for event in recorder.items] == [*range(1, 5001)]
    assert not any(event.redelivered for event in recorder.items)
    assert len(slots(shop)) == (later == "wal")


@pytest.mark.parametrize(("former", "later"), BOTH)
@pytest.mark.parametrize("full", [False, True])
def test_with_writers_at_work(
    full: bool, former: str, later: str, hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """Each change that is committed meanwhile comes once, in the order of its record."""
    if full:
        # Then the log has rows with the old values, and otherwise messages of triggers.
        shop("ALTER TABLE items REPLICA IDENTITY FULL")
    watchers = [watch("items", "updated", columns=["n"])]
    hub.on("items")(recorder)
    hub.on_gap(recorder)
    hub.start(shop.dsn, watchers, delivery=former, name="mailer")
    with writers(shop):
        for delivery in (later, former, later):
            recorder.wait(len(recorder.items) + 100)
            assert hub.stop()
            hub.start(shop.dsn, watchers, delivery=delivery, name="mailer")
            until_reads(shop, delivery)
        recorder.wait(len(recorder.items) + 100)
    settle(hub)
    assert gaps(recorder.items) == []
    check(shop, [(e.id, e.values["n"], e.uid, e.redelivered) for e in recorder.items])


CONSUME = """
import os, signal, sys
import pgsignals
from pgsignals.consumers.consumer_store import ConsumerStore
from pgsignals.sources.handover import Handover

delivery, path, point = sys.argv[1:]
ledger = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def die(here):
    if here == point:
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()

limit, hand_over = Handover.limit, ConsumerStore.hand_over

def limiting(self, poll):
    found = limit(self, poll)
    if self.ending:
        die("ending")
    return found

def handing_over(self, *given):
    die("before")
    done = hand_over(self, *given)
    if done:
        die("after")
    return done

Handover.limit, ConsumerStore.hand_over = limiting, handing_over

@pgsignals.on("items")
def receive(event):
    line = f"{event.id} {event.values['n']} {event.uid} {int(event.redelivered)}\\n"
    os.write(ledger, line.encode())

@pgsignals.on_gap
def gap(gap):
    os.write(ledger, f"{gap!r}\\n".encode())

pgsignals.start(os.environ["PGSIGNALS_DSN"],
                [pgsignals.watch("items", "updated", columns=["n"])],
                delivery=delivery, name="mailer", lease=2.0)
os.write(1, b"started\\n")
pgsignals.run()
"""


@pytest.mark.parametrize(("former", "later"), BOTH)
@pytest.mark.parametrize("point", ["ending", "before", "after"])
def test_killed_on_the_way(
    point: str, former: str, later: str, shop: Database, tmp_path: Path
) -> None:
    """Killed at any point of the change, the consumer loses nothing, and repeats nothing unsaid."""
    ledger = tmp_path / "ledger"

    def lines() -> list[str]:
        return ledger.read_text().splitlines() if ledger.exists() else []

    def consume(delivery: str, point: str = "-") -> Forked:
        return Forked("-c", CONSUME, delivery, str(ledger), point, dsn=shop.dsn)

    def further(count: int) -> None:
        most = len(lines()) + count
        eventually(lambda: len(lines()), lambda found: found >= most)

    shop("ALTER TABLE items REPLICA IDENTITY FULL")
    process = consume(former)
    try:
        assert process.out() == "started"
        with writers(shop):
            further(50)
            process.process.kill()
            process.process.wait()
            process = consume(later, point)
            assert process.process.wait(DEADLINE) == -signal.SIGKILL
            assert reads(shop) == (later if point == "after" else former)
            process = consume(later)
            until_reads(shop, later)
            further(50)
        [(committed,)] = shop("SELECT count(*) FROM history")
        eventually(
            lambda: len({tuple(each.split()[:2]) for each in lines()}),
            lambda count: count >= committed,
        )
    finally:
        process.process.kill()
        process.process.wait()
    told = [each.split() for each in lines()]
    check(shop, [(int(key), int(n), uid, again == "1") for key, n, uid, again in told])
    assert len(slots(shop)) == (later == "wal")


@pytest.mark.parametrize(("former", "later"), BOTH)
def test_beside_a_process_of_the_former_delivery(
    former: str,
    later: str,
    hub: pgsignals.Hub,
    another: Callable[[], pgsignals.Hub],
    shop: Database,
    recorder: Recorder,
) -> None:
    """A process of another delivery stands by, and changes it when the active one has stopped."""
    other = another()
    for each in (hub, other):
        each.on("items")(recorder)
        each.on_gap(recorder)
    start(hub, shop, former)
    start(other, shop, later)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    assert hub.status().active
    assert not other.status().active
    assert reads(shop) == former
    assert hub.stop()
    until_reads(shop, later)
    # And the other way round: whoever reads brings the consumer to its own delivery.
    start(hub, shop, former)
    shop("INSERT INTO items VALUES (2)")
    recorder.wait(2)
    assert other.stop()
    until_reads(shop, former)
    shop("INSERT INTO items VALUES (3)")
    settle(hub)
    assert [getattr(each, "id", each) for each in recorder.items] == [1, 2, 3]


@pytest.mark.parametrize(("former", "later"), BOTH)
def test_who_stands_by_follows(
    former: str,
    later: str,
    hub: pgsignals.Hub,
    another: Callable[[], pgsignals.Hub],
    shop: Database,
    recorder: Recorder,
) -> None:
    """Of two processes of the later delivery, the one that stood by goes on in it at once."""
    others = [another(), another()]
    start(hub, shop, former)
    for each in others:
        each.on("items")(recorder)
        each.on_gap(recorder)
        start(each, shop, later)
    assert hub.stop()
    until_reads(shop, later)
    active = eventually(lambda: [each for each in others if each.status().active], bool)[0]
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    settle(active)
    assert active.stop()
    shop("INSERT INTO items VALUES (2)")
    recorder.wait(2)
    assert [getattr(each, "id", each) for each in recorder.items] == [1, 2]
    assert reads(shop) == later


@pytest.mark.parametrize(("former", "later"), BOTH)
def test_what_served_the_former_goes(
    former: str,
    later: str,
    hub: pgsignals.Hub,
    shop: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triggers and publications of the former delivery are removed once nobody needs them."""
    monkeypatch.setattr("pgsignals.outbox.housekeeping.EVERY_SECONDS", 0.2)
    served = {"outbox": ["trigger"], "wal": ["pgsignals", "pgsignals_inserts"]}
    start(hub, shop, former)
    assert triggers(shop) == served[former]
    assert hub.stop()
    start(hub, shop, later)
    until_reads(shop, later)
    eventually(lambda: triggers(shop), lambda found: found == served[later])


@pytest.mark.parametrize(("former", "later"), BOTH)
def test_while_a_transaction_is_open(
    former: str,
    later: str,
    hub: pgsignals.Hub,
    shop: Database,
    connect: Callable[[str], Database],
    recorder: Recorder,
) -> None:
    """The consumer goes on in the former delivery until what was being written then has ended."""
    hub.on("items")(recorder)
    hub.on_gap(recorder)
    start(hub, shop, former)
    assert hub.stop()
    if later == "wal":
        # A slot waits for transactions, too: let it be there already.
        slot = slot_name(shop.connection.info.dbname, "mailer")
        shop("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
    other = connect(shop.dsn)
    other("CREATE TABLE other (id int)")
    other.connection.autocommit = False
    other("INSERT INTO other VALUES (1)")
    start(hub, shop, later)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    assert reads(shop) == former
    # It began before the later delivery was installed, and writes behind that.
    other("INSERT INTO items VALUES (2)")
    other.connection.commit()
    until_reads(shop, later)
    shop("INSERT INTO items VALUES (3)")
    settle(hub)
    assert [getattr(each, "id", each) for each in recorder.items] == [1, 2, 3]


@pytest.mark.parametrize(("former", "later"), BOTH)
def test_dead_letters_stay(
    former: str, later: str, hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """A dead letter of the former delivery is delivered again in the later one, as it was."""
    broken = threading.Event()
    broken.set()

    @hub.on("items", "updated", retries=0)
    def receive(event: pgsignals.Event) -> None:
        if broken.is_set():
            raise ValueError("broken")
        recorder(event)

    watchers = [watch("items", "updated", columns=["n"])]
    shop("INSERT INTO items VALUES (1)")
    hub.start(shop.dsn, watchers, delivery=former, name="mailer")
    shop("UPDATE items SET n = 7")
    eventually(lambda: shop("SELECT uid FROM pgsignals.dead_letters"), bool)
    assert hub.stop()
    broken.clear()
    hub.start(shop.dsn, watchers, delivery=later, name="mailer")
    until_reads(shop, later)
    [(uid,)] = shop("SELECT uid FROM pgsignals.dead_letters")
    assert run("dead-letters", "retry", "--all", dsn=shop.dsn).code == 0
    [event] = recorder.wait(1)
    assert (event.uid, event.values["n"], event.old["n"]) == (uid, 7, 0)
    eventually(lambda: shop("SELECT uid FROM pgsignals.dead_letters"), lambda left: left == [])


@pytest.mark.parametrize(("former", "later"), BOTH)
def test_a_broker_that_is_away(
    former: str, later: str, hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """A broker's consumer goes on by itself, once the broker has taken what was left."""
    broker = Broker()
    hub.on("items")(recorder)
    start(hub, shop, former, backends=[broker])
    broker.away.set()
    shop("INSERT INTO items SELECT generate_series(1, 100)")
    assert broker.refused.wait(DEADLINE)
    settle(hub)
    hub.stop(1)
    broker.closed.clear()
    start(hub, shop, later, backends=[broker])
    until_reads(shop, later)
    shop("INSERT INTO items SELECT generate_series(101, 200)")
    settle(hub)
    assert reads(shop, "mailer/broker") == former
    broker.away.clear()
    until_reads(shop, later, "mailer/broker")
    told = broker.acknowledged.wait(200)
    assert [*dict.fromkeys(event.id for event in told)] == [*range(1, 201)]
    assert gaps(told) == []
    assert [event.id for event in recorder.items] == [*range(1, 201)]


def test_several_partitions_are_refused(hub: pgsignals.Hub, shop: Database) -> None:
    """A consumer of several partitions is not taken along, and the error says what to do."""
    start(hub, shop, "outbox", partitions=3)
    assert hub.stop()
    with pytest.raises(pgsignals.ConfigurationError, match=r"partitions=3.*under a new name"):
        start(hub, shop, "wal")
    assert reads(shop) == "outbox"
    assert slots(shop) == []


@pytest.mark.parametrize(("former", "later"), BOTH)
def test_when_others_install(
    former: str, later: str, hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """With install="check", the later delivery has to be installed beside the former one."""
    hub.on("items")(recorder)
    hub.on_gap(recorder)
    start(hub, shop, former)
    assert hub.stop()
    shop("INSERT INTO items VALUES (1)")
    with pytest.raises(pgsignals.DriftError, match=f"--delivery {later}|pgsignals install"):
        start(hub, shop, later, install="check")
    assert run("install", "items", "--delivery", later, dsn=shop.dsn).code == 0
    start(hub, shop, later, install="check")
    until_reads(shop, later)
    shop("INSERT INTO items VALUES (2)")
    settle(hub)
    assert [getattr(each, "id", each) for each in recorder.items] == [1, 2]


def test_from_messages_alone(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A consumer that was served by messages is served by them until it goes on in the outbox."""
    hub.on("items")(recorder)
    hub.on_gap(recorder)
    start(hub, shop, "wal", capture="messages")
    assert hub.stop()
    shop("INSERT INTO items VALUES (1)")
    start(hub, shop, "outbox")
    until_reads(shop, "outbox")
    assert "pgsignals" not in triggers(shop)
    shop("INSERT INTO items VALUES (2)")
    settle(hub)
    assert [getattr(each, "id", each) for each in recorder.items] == [1, 2]


@pytest.mark.parametrize(
    "trouble", ["the slot is dropped", "the table is published anew", "the slot is advanced"]
)
def test_trouble_on_the_way(
    trouble: str,
    hub: pgsignals.Hub,
    shop: Database,
    connect: Callable[[str], Database],
    recorder: Recorder,
) -> None:
    """What was prepared for the later delivery, and is not whole any more, is prepared again."""
    hub.on("items")(recorder)
    hub.on_gap(recorder)
    start(hub, shop, "outbox")
    assert hub.stop()
    gate, other = threading.Event(), connect(shop.dsn)
    hub.on("items")(lambda event: gate.wait(DEADLINE))
    shop("INSERT INTO items VALUES (1)")
    start(hub, shop, "wal")
    recorder.wait(1)
    [slot] = slots(shop)
    if trouble == "the slot is dropped":
        shop("SELECT pg_drop_replication_slot(%s)", (slot,))
    elif trouble == "the slot is advanced":
        shop("SELECT pg_replication_slot_advance(%s, pg_current_wal_flush_lsn())", (slot,))
    else:
        shop("ALTER PUBLICATION pgsignals_inserts DROP TABLE items")
        other("INSERT INTO items VALUES (2)")
        shop("ALTER PUBLICATION pgsignals_inserts ADD TABLE items")
    gate.set()
    until_reads(shop, "wal")
    shop("INSERT INTO items VALUES (3)")
    settle(hub)
    keys = [getattr(each, "id", each) for each in recorder.items]
    assert [*dict.fromkeys(keys)] == ([1, 2, 3] if trouble.startswith("the table") else [1, 3])
    assert all(e.redelivered for n, e in enumerate(recorder.items) if e.id in keys[:n])


def test_what_a_crash_left(hub: pgsignals.Hub, shop: Database) -> None:
    """A slot, or a position in the outbox, that a change has left behind is removed at a start."""
    start(hub, shop, "outbox")
    assert hub.stop()
    slot = slot_name(shop.connection.info.dbname, "mailer")
    shop("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
    start(hub, shop, "outbox")
    assert slots(shop) == []
    assert hub.stop()
    start(hub, shop, "wal")
    until_reads(shop, "wal")
    assert hub.stop()
    shop("UPDATE pgsignals.consumers SET snapshot = pg_current_snapshot()::text, floor = 0")
    start(hub, shop, "wal")
    assert shop("SELECT snapshot FROM pgsignals.consumers") == [(None,)]


@pytest.mark.parametrize(("former", "later"), BOTH)
def test_a_backfill_goes_on(
    former: str, later: str, hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """A backfill that was begun in the former delivery is ended in the later one."""
    shop("INSERT INTO items SELECT generate_series(1, 2000)")
    begun = threading.Event()

    @hub.on("items", "snapshot")
    def receive(event: pgsignals.Event) -> None:
        recorder(event)
        begun.set()

    start(hub, shop, former)
    hub.backfill("items", chunk=50)
    assert begun.wait(DEADLINE)
    hub.stop()
    start(hub, shop, later)
    until_reads(shop, later)
    eventually(
        lambda: shop("SELECT finished FROM pgsignals.backfill_parts"),
        lambda found: found == [(True,)],
    )
    settle(hub)
    assert [*dict.fromkeys(event.id for event in recorder.items)] == [*range(1, 2001)]
