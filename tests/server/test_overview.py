"""One database's signals at a moment, as ``top`` and the console read them."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import datetime, timezone

import psycopg2
import pytest
from psycopg2.extensions import make_dsn, parse_dsn

import pgsignals
from pgsignals import Event, Hub, watch
from pgsignals.core.units import age_text, size_text
from pgsignals.outbox.inspection import read_outbox
from pgsignals.overview.events import read_rows, shown_events
from pgsignals.overview.history import POINT_SECONDS, POINTS, History
from pgsignals.overview.model import ConsumerState, Overview, WatcherState
from pgsignals.overview.monitor import Monitor, Viewer
from pgsignals.overview.reader import Reader
from pgsignals.postgres.connection import opened
from tests.conftest import DEADLINE, Database
from tests.waiting import eventually


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders."""
    db("CREATE TABLE orders (id bigint PRIMARY KEY, status text)")


@pytest.fixture
def hub() -> Iterator[Callable[..., Hub]]:
    """Starts Hubs, which are stopped in the end."""
    with ExitStack() as stack:

        def start(*arguments: object, hub: Hub | None = None, **options: object) -> Hub:
            started = hub or Hub()
            started.start(*arguments, **options)  # type: ignore[arg-type]
            stack.callback(started.stop)
            return started

        yield start


@pytest.fixture
def reader(dsn: str) -> Iterator[Reader]:
    """Reads the database, without values."""
    with closing(Reader(dsn)) as made:
        yield made


def until(done: Callable[[], bool]) -> None:
    """Wait until that is so."""
    eventually(done, bool)


def poisoned(hub: Hub) -> threading.Event:
    """Give a Hub a receiver that cannot take order 7 until what this returns is set."""
    mended = threading.Event()

    @hub.on("orders", retries=0)
    def send(event: Event) -> None:
        if event.id == 7 and not mended.is_set():
            raise ValueError("<b>no price</b> password=secret")

    return mended


def test_every_watcher_of_every_namespace(
    dsn: str, reader: Reader, hub: Callable[..., Hub]
) -> None:
    """Each trigger and each row-watch has its delivery, owner, definition and state."""
    paid = watch("orders", "updated", columns=["status"], when="NEW.status = 'paid'", label="paid")
    hub(dsn, [paid])
    hub(dsn, ["orders"], delivery="outbox", name="mailer", namespace="jobs")
    hub(dsn, [("orders", "inserted")], delivery="wal", name="logger", namespace="log")
    found = {(each.namespace, each.op): each for each in reader.read().watchers}
    assert set(found) == {
        ("default", "updated"),
        *(("jobs", op) for op in ("inserted", "updated", "deleted")),
        ("log", "inserted"),
    }
    notify = found["default", "updated"]
    assert (notify.delivery, notify.served, notify.owner) == ("notify", None, "postgres")
    assert (notify.columns, notify.condition) == (("id", "status"), "NEW.status = 'paid'")
    assert (notify.status, notify.label, notify.listeners) == ("INSTALLED", "paid", 1)
    assert found["jobs", "deleted"].consumers == ("mailer",)
    assert (found["log", "inserted"].served, found["log", "inserted"].delivery) == ("rows", "wal")
    assert "NEW.status = 'paid'" in reader.definition(notify.name)
    assert reader.definition(notify.name).startswith("CREATE TRIGGER")
    assert "public.orders" in reader.definition(found["log", "inserted"].name)


def test_those_that_do_the_same_and_those_for_nobody(
    dsn: str, reader: Reader, hub: Callable[..., Hub]
) -> None:
    """Triggers that do the same on a table know one another; one that nobody needs says so."""
    for namespace in ("one", "two"):
        hub(dsn, [("orders", "inserted")], namespace=namespace)
    Hub().start(dsn, [("orders", "deleted")], namespace="gone").stop()
    until(lambda: [e.status for e in read(reader).watchers if e.namespace == "gone"] == ["STALE"])
    overview = read(reader)
    by_namespace = {each.namespace: each for each in overview.watchers}
    one, two = by_namespace["one"], by_namespace["two"]
    assert (one.twins, two.twins) == ((two.name,), (one.name,))
    assert by_namespace["gone"].twins == ()
    assert by_namespace["gone"].detail == "nobody listens"
    assert ("triggers", "warn") in {(each.check, each.level) for each in overview.findings}


def read(reader: Reader) -> Overview:
    """Read all anew."""
    reader.close()
    return reader.read()


def test_a_lag_is_that_of_the_outbox(
    dsn: str, db: Database, reader: Reader, hub: Callable[..., Hub]
) -> None:
    """What a consumer is behind is as `consumers list` tells it, with bytes and a reason."""
    Hub().start(dsn, ["orders"], delivery="outbox", name="late").stop()
    first = reader.read().consumers
    assert [(each.name, each.lag, each.active) for each in first] == [("late", 0, False)]
    for start in (1, 101):
        db("INSERT INTO orders SELECT n, 'new' FROM generate_series(%s, %s) n", (start, start + 99))
    db("UPDATE orders SET status = 'paid' WHERE id = 7")
    [late] = reader.read().consumers
    with opened(dsn) as cursor:
        [known] = read_outbox(cursor).consumers
    assert (late.lag, late.counted) == (known.lag, True) == (201, True)
    assert late.lag_bytes == db("SELECT sum(octet_length(payload)) FROM pgsignals.outbox")[0][0]
    assert late.lag_seconds >= 0
    assert late.reason == "no process reads it"
    hub(dsn, ["orders"], delivery="outbox", name="late")
    until(lambda: reader.read().consumers[0].lag == 0)
    [late] = reader.read().consumers
    assert (late.active, late.acknowledged, late.reason, late.kind) == (True, 201, "", "consumer")
    assert late.pid is not None


def test_it_installs_nothing_and_is_no_consumer(
    dsn: str, db: Database, reader: Reader, hub: Callable[..., Hub]
) -> None:
    """Reading, listening and hearing leave the catalogue and the consumers alone."""
    hub(dsn, ["orders"])
    hub(dsn, ["orders"], delivery="outbox", name="mailer")

    def there() -> list[tuple[object, ...]]:
        return db(
            "SELECT (SELECT count(*) FROM pg_class), (SELECT count(*) FROM pg_proc),"
            " (SELECT count(*) FROM pg_trigger), (SELECT count(*) FROM pg_replication_slots),"
            " (SELECT array_agg(name) FROM pgsignals.consumers)"
        )

    before = there()
    reader.read()
    reader.listen(True)
    db("INSERT INTO orders VALUES (1, 'new')")
    heard: list[object] = []

    def all_heard() -> bool:
        reader.hear()
        reader.read()
        heard.extend(reader.events())
        return len(heard) >= 2

    until(all_heard)
    assert there() == before
    assert reader.connection is not None
    pid = reader.connection.info.backend_pid
    assert db("SELECT count(*) FROM pg_locks WHERE pid = %s", (pid,)) == [(0,)]


@pytest.mark.parametrize("values", [False, True])
def test_events_of_both_kinds_are_heard(
    dsn: str, db: Database, hub: Callable[..., Hub], values: bool
) -> None:
    """Notifications and rows of the outbox are events with their keys, and values if they may."""
    hub(dsn, [watch("orders", "updated", columns=["status"])])
    hub(dsn, ["orders"], delivery="outbox", name="mailer", namespace="jobs")
    with closing(Reader(dsn, values=values)) as reader:
        reader.read()
        reader.listen(True)
        db("INSERT INTO orders VALUES (7, 'secret'), (8, NULL)")
        db("UPDATE orders SET id = 9, status = 'open' WHERE id = 7")
        heard = []

        def all_heard() -> bool:
            reader.hear()
            reader.read()
            heard.extend(reader.events())
            return len(heard) >= 4

        until(all_heard)
        rates = reader.overview.rates
    told = {(each.delivery, each.op, each.record, each.values) for each in heard}
    assert told == {
        ("outbox", "inserted", "7", ""),
        ("outbox", "inserted", "8", ""),
        ("outbox", "updated", "7 → 9", ""),
        ("notify", "updated", "7 → 9", "secret → open" if values else ""),
    }
    assert {each.table for each in heard} == {"public.orders"}
    assert len(rates) == 4
    assert max(rates.values()) > 0


def test_a_payload_of_anybody(dsn: str, db: Database, hub: Callable[..., Hub]) -> None:
    """What anybody sends on a channel of ours is no event, and harms nothing."""
    hub(dsn, [("orders", "inserted")])
    with closing(Reader(dsn)) as reader:
        [watcher] = reader.read().watchers
        reader.listen(True)
        for junk in ("", "{", "[]", "null\n1", '{"v":1,"x":1,"s":1,"t":1}\n[1', "x\n\n\n\ty"):
            db("SELECT pg_notify(%s, %s)", (watcher.name, junk))
        db("INSERT INTO orders VALUES (1)")
        heard = []

        def arrived() -> bool:
            reader.hear()
            heard.extend(reader.events())
            return any(each.record == "1" for each in heard)

        until(arrived)
    assert {each.record for each in heard} <= {"", "1"}


def _watcher() -> WatcherState:
    return WatcherState(
        "pgsignals_0", "default", "notify", None, "public", "orders", "updated", None,
        ("id",), "", "postgres", "INSTALLED", "", 1, (), (),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("payload", "rows"),
    [
        ('{"v":1,"x":1,"s":1,"t":1}\n5', [("5", "")]),
        ('{"v":1,"x":1,"s":1,"t":1}\n[1,"a"]', [("1, a", "")]),
        ('{"v":1,"x":1,"s":1,"t":1}\n[1\t,null,"x"]', [("1", "NULL, x")]),
        ('{"v":1,"x":1,"s":1,"t":1}\n[1\t,"b","a","1"]', [("1", "a → b")]),
        ('{"v":1,"x":1,"s":1,"t":1,"moved":true}\n[2,1]', [("1 → 2", "")]),
        ('{"v":1,"x":1,"s":1,"t":1,"error":"no column \'x\'"}', []),
    ],
)
def test_rows_of_payloads(payload: str, rows: list[tuple[str, str]]) -> None:
    """A payload's rows are keys and values, without the watcher that they are for."""
    found = read_rows(payload)
    assert found is not None
    assert found[1] == rows
    shown = list(shown_events(_watcher(), payload, values=False))
    assert all(each.values == "" and "column" not in each.note for each in shown)


def test_dead_letters(dsn: str, db: Database, reader: Reader, hub: Callable[..., Hub]) -> None:
    """A dead letter names its record, and holds a row's values only if they may be seen."""
    mended = poisoned(poor := Hub())
    hub(dsn, [watch("orders", extra=["status"])], delivery="outbox", name="mailer", hub=poor)
    db("INSERT INTO orders VALUES (7, 'top secret'), (8, 'new')")
    until(lambda: reader.read().dead_letters.total == 1)
    letters = reader.read().dead_letters
    [letter] = letters.latest
    assert letters.consumers == {"mailer": 1}
    assert (letter.table, letter.op, letter.record) == ("public.orders", "inserted", "id 7")
    assert letter.error == "ValueError: <b>no price</b> password=***"
    assert letter.retrying is False
    detail = reader.letter(letter.id)
    assert (detail.values, detail.consumer, detail.attempts) == ("", "mailer", 1)
    assert "in send" in detail.traceback
    assert "secret" not in str(detail)
    with closing(Reader(dsn, values=True)) as seeing:
        assert json.loads(seeing.letter(letter.id).values)["values"] == {"status": "top secret"}
    with pytest.raises(pgsignals.DatabaseError, match="no dead letter 99"):
        reader.letter(99)
    mended.set()
    assert reader.retry([letter.id]) == 1
    until(lambda: reader.read().dead_letters.total == 0)


def test_many_dead_letters(dsn: str, db: Database, reader: Reader) -> None:
    """Of 100,000, the latest are there within a second, and the others by pages."""
    Hub().start(dsn, ["orders"], delivery="outbox", name="mailer").stop()
    db(
        "INSERT INTO pgsignals.dead_letters"
        " (consumer, receiver, uid, channel, number, payload, error, traceback, attempts)"
        " SELECT 'mailer', 'shop.send', n::text, 0, 0, '{}', 'ValueError', repeat('x', 1000), 1"
        " FROM generate_series(1, 100000) n"
    )
    reader.read()
    began = datetime.now(timezone.utc)
    letters = reader.read().dead_letters
    page = reader.letters(before=letters.latest[-1].id, consumer="mailer")
    took = (datetime.now(timezone.utc) - began).total_seconds()
    assert letters.total == 100_000
    assert [each.id for each in page] == list(range(99_950, 99_900, -1))
    assert took < 1


def test_a_role_that_may_read_little(dsn: str, db: Database, hub: Callable[..., Hub]) -> None:
    """Without rights on the schema the overview says which are lacking, and shows the rest."""
    hub(dsn, ["orders"], delivery="outbox", name="mailer")
    db("DROP ROLE IF EXISTS looks_on")
    db("CREATE ROLE looks_on LOGIN")
    try:
        with closing(Reader(make_dsn(dsn, user="looks_on"))) as reader:
            overview = reader.read()
            assert overview.connected
            assert "GRANT USAGE ON SCHEMA pgsignals" in overview.problem
            assert (len(overview.watchers), overview.consumers) == (3, ())
            db("GRANT USAGE ON SCHEMA pgsignals TO looks_on")
            db("GRANT SELECT ON ALL TABLES IN SCHEMA pgsignals TO looks_on")
            db("GRANT SELECT ON ALL SEQUENCES IN SCHEMA pgsignals TO looks_on")
            overview = read(reader)
            assert (overview.problem, len(overview.consumers)) == ("", 1)
    finally:
        db("DROP OWNED BY looks_on")
        db("DROP ROLE looks_on")


def test_a_database_that_is_away(dsn: str) -> None:
    """The overview says why it cannot be read, without a password, and nothing is raised."""
    away = make_dsn(dsn, port="1", password="hunter2hunter2")
    with closing(Reader(away)) as reader:
        overview = reader.read()
    assert not overview.connected
    assert "Cannot connect" in overview.problem
    assert "hunter2" not in overview.problem


def test_a_session_that_is_ended(dsn: str, db: Database, reader: Reader) -> None:
    """A session that the server ends is a problem once, and the next look has another."""
    assert reader.read().connected
    assert reader.connection is not None
    pid = reader.connection.info.backend_pid
    db("SELECT pg_terminate_backend(%s, 60000)", (pid,))
    assert not reader.read().connected
    again = reader.read()
    assert (again.connected, again.problem) == (True, "")


def test_the_history_has_bounds() -> None:
    """An hour is kept for each consumer, of each half minute the worst, and no more."""
    history = History()
    now = datetime.now(timezone.utc)

    def lag(name: str, events: int) -> ConsumerState:
        return ConsumerState(
            name, 0, 1, "consumer", False, True, "", None, "outbox", events, True, events,
            float(events), 0, now, 0, None, "",
        )  # fmt: skip

    history.note(0, [lag("gone", 1)])
    for turn in range(10_000):
        history.note(turn * 2.0, [lag("mailer", turn % 100)])
    lags = history.lags(9_999 * 2.0)
    assert set(lags) == {"mailer"}
    assert len(lags["mailer"]) == POINTS
    assert [ago for ago, _ in lags["mailer"]][-1] == 0
    assert max(each.events or 0 for _, each in lags["mailer"]) == 99
    history.note(9_999 * 2.0 + POINTS * POINT_SECONDS, [])
    assert history.lags(0) == {}


@pytest.fixture
def monitor(dsn: str) -> Iterator[Monitor]:
    """Reads the database for all who look on."""
    with closing(Monitor(dsn)) as made:
        yield made


def told(viewer: Viewer, name: str) -> str:
    """Wait for what is told of a part."""
    found: list[str] = []

    def arrived() -> bool:
        found.extend(each.data for each in viewer.wait(1) if each.name == name)
        return bool(found)

    until(arrived)
    return found[-1]


def test_viewers_are_told_of_changes(dsn: str, db: Database, monitor: Monitor) -> None:
    """Who looks on gets each part once, and then what changes; who comes later gets all of it."""
    with Hub().start(dsn, [("orders", "inserted")]), monitor.viewing() as one:
        assert json.loads(told(one, "watchers"))[0]["table"] == "orders"
        db("INSERT INTO orders VALUES (1)")
        [event] = json.loads(told(one, "events"))
        assert (event["record"], event["delivery"]) == ("1", "notify")
        with monitor.viewing() as other:
            assert monitor.viewers == 2
            assert json.loads(told(other, "events")) == [event]
    assert monitor.viewers == 0


def test_many_who_look_on_cost_as_one(dsn: str, monitor: Monitor) -> None:
    """Twenty who look on cost the server at most one statement a second."""
    name = parse_dsn(dsn)["dbname"]
    elsewhere = psycopg2.connect(make_dsn(dsn, dbname="postgres"))
    elsewhere.autocommit = True

    def statements() -> int:
        with elsewhere.cursor() as cursor:
            cursor.execute(
                "SELECT pg_stat_clear_snapshot(), xact_commit + xact_rollback"
                " FROM pg_stat_database WHERE datname = %s",
                (name,),
            )
            [(_, count)] = cursor.fetchall()
        return int(count)

    with closing(elsewhere), ExitStack() as stack:
        viewers = [stack.enter_context(monitor.viewing()) for _ in range(20)]

        def moment() -> datetime:
            times = [json.loads(told(each, "state"))["at"] for each in viewers]
            return datetime.fromisoformat(min(times).replace("Z", "+00:00"))

        # Behind what the first look reads, which seldom changes, and is counted a little later.
        for _ in range(3):
            moment()
        before, began = statements(), moment()
        # Taking time is what is tested: what the server is asked within it.
        until(lambda: (moment() - began).total_seconds() >= 10)
        seconds = (moment() - began).total_seconds()
        assert statements() - before <= seconds


def test_it_ends(dsn: str, db: Database, monitor: Monitor) -> None:
    """Its session and its thread end with it, and who looks on then is told of nothing."""
    with monitor.viewing() as viewer:
        told(viewer, "state")
        monitor.close()
        assert viewer.wait(DEADLINE) is not None
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    until(lambda: db(sessions) == [(1,)])


def test_memory_has_bounds(monitor: Monitor) -> None:
    """Ten thousand updates that are pushed to twenty who look on leave no more than 5 MB behind."""
    viewers = [Viewer(monitor) for _ in range(20)]
    page = json.dumps([{"name": "x" * 30, "number": n} for n in range(50)])

    def push(turn: int) -> None:
        monitor.tell({"consumers": page.replace("0", str(turn % 10)), "state": str(turn)}, [page])
        for viewer in viewers:
            assert viewer.wait(0)

    for turn in range(1_000):
        push(turn)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for turn in range(10_000):
            push(turn)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 5 << 20


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (3.4, "3 s"), (968.9, "16 min"), (9000, "2.5 h"), (3e5, "3 d")],
)
def test_ages(seconds: float, text: str) -> None:
    """An age is a number that can be read at a glance."""
    assert age_text(seconds) == text
    assert size_text(1 << 20) == "1MiB"
