"""Streams in outbox delivery: a browser that comes back gets exactly what it has missed."""

from __future__ import annotations

import base64
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn, parse_dsn

import pgsignals
from pgsignals import Hub
from pgsignals.contrib.event_stream import View
from pgsignals.contrib.replayed import LogFeed
from pgsignals.contrib.resumable import ResumableFeed, open_feed
from pgsignals.contrib.ring import RingFeed
from pgsignals.hub.hub import Delivery
from pgsignals.outbox.cursors import IdBounds
from pgsignals.outbox.housekeeping import tidy
from pgsignals.testing import Server
from pgsignals.testing.server import StopMode
from pgsignals.triggers import names
from tests.conftest import DEADLINE, Database, Recorder
from tests.event_source import Browser, Tab, told
from tests.grants import documented_grants
from tests.proxy import Proxy
from tests.waiting import eventually

ITEMS = pgsignals.watch("items", "inserted", "updated", extra=["tenant", "n"])


@pytest.fixture
def shop(db: Database) -> Database:
    """A database with a table."""
    db("CREATE TABLE items (id bigint, tenant int NOT NULL DEFAULT 1, n int, PRIMARY KEY (id))")
    return db


@pytest.fixture
def durable(request: pytest.FixtureRequest) -> Delivery:
    """The delivery."""
    chosen: Delivery = getattr(request, "param", "outbox")
    return chosen


# What holds in WAL delivery, too.
both = pytest.mark.parametrize("durable", ["outbox", "wal"], indirect=True)


@pytest.fixture
def process(shop: Database, durable: Delivery) -> Iterator[Callable[..., Any]]:
    """Starts Hubs, each as another process would, and gives a feed of each."""
    hubs: list[Hub] = []

    def start(size: int = 1000, **options: Any) -> RingFeed[Any]:
        hub = Hub()
        hubs.append(hub)
        hub.start(shop.dsn, [ITEMS], delivery=durable, **options)
        feed = open_feed(hub, "items", size=size, ordered=True)
        assert isinstance(feed, ResumableFeed if durable == "outbox" else LogFeed)
        return feed

    yield start
    for hub in hubs:
        hub.stop()


Process = Callable[..., Any]


@both
@pytest.mark.parametrize("elsewhere", [False, True])
def test_it_goes_on_where_it_was(process: Process, shop: Database, elsewhere: bool) -> None:
    """What happened while it was away comes once, then what happens next, in any process."""
    first = process()
    tab = Tab(first, Browser())
    shop("INSERT INTO items SELECT generate_series(1, 5)")
    tab.wait(5)
    tab.client.close()
    tab.browser.messages.pop()
    # As if the last of one statement's messages had not arrived.
    again = Tab(first, Browser())
    again.browser.last_id = tab.browser.last_id
    shop("INSERT INTO items SELECT generate_series(6, 8)")
    other = Tab(process() if elsewhere else first, Browser(last_id=tab.browser.last_id))
    assert other.wait(3) == [6, 7, 8]
    shop("INSERT INTO items VALUES (9)")
    assert other.wait(4) == [6, 7, 8, 9]


@both
def test_within_a_statement(process: Process, shop: Database) -> None:
    """A connection may break between two messages of one statement, and in a window's midst."""
    whole = Browser()
    shop("INSERT INTO items VALUES (0)")
    tab = Tab(process(), whole)
    shop("INSERT INTO items SELECT generate_series(1, 2000)")
    pieces = b""
    while len(whole.messages) < 2000:
        piece = tab.more()
        whole.receive(piece)
        pieces += piece
    frames = [frame + b"\n\n" for frame in pieces.split(b"\n\n") if frame]
    other = process()
    for cut in (1, 2, 999, 1999):
        browser = Browser()
        browser.receive(b"".join(frames[:cut]))
        assert Tab(other, browser).wait(2000) == list(range(1, 2001))


@both
def test_a_late_commit(process: Process, shop: Database) -> None:
    """A transaction whose ids are lower than what the browser got last, and that commits later."""
    tab = Tab(process(), Browser())
    slow = psycopg2.connect(shop.dsn)
    try:
        slow.cursor().execute("INSERT INTO items VALUES (1)")
        shop("INSERT INTO items VALUES (2)")
        assert tab.wait(1) == [2]
        tab.client.close()
        slow.commit()
    finally:
        slow.close()
    again = Tab(process(), tab.browser)
    assert again.wait(2) == [2, 1]
    again.client.close()
    shop("INSERT INTO items VALUES (3)")
    assert Tab(process(), tab.browser).wait(3) == [2, 1, 3]


def test_one_that_is_ahead_of_this_process(
    process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets nothing twice from a process that has not read so far as the one it comes from."""
    feed, behind = process(), process()
    tab = Tab(feed, Browser())
    with monkeypatch.context() as patch:
        patch.setattr(behind, "turned", lambda place: None)
        shop("INSERT INTO items VALUES (1)")
        assert tab.wait(1) == [1]
        tab.stay()
        tab.client.close()
        again = Tab(behind, tab.browser)
        assert again.client.read() == b""
        assert list(behind._impatient) == [again.client]
    shop("INSERT INTO items VALUES (2)")
    assert again.wait(2) == [1, 2]


def test_who_reads_slowly_misses_nothing(process: Process, shop: Database) -> None:
    """A client that falls further behind than the feed holds reads the outbox instead."""
    feed = process(size=10)
    tab = Tab(feed, Browser())
    quick = Tab(feed, Browser())
    for number in range(1, 101):
        shop("INSERT INTO items SELECT generate_series(%s, %s)", (10 * number - 9, 10 * number))
    assert quick.wait(1000) == list(range(1, 1001))
    assert tab.wait(1000) == list(range(1, 1001))
    assert len(feed._ring.entries) == 10


@both
def test_a_row_that_is_long(durable: Delivery, shop: Database) -> None:
    """One row that is longer than a page is read, and what follows it too."""
    shop("ALTER TABLE items ADD COLUMN text text")
    watcher = pgsignals.watch("items", "inserted", extra=["text"])
    hubs = [Hub(), Hub()]
    try:
        for hub in hubs:
            hub.start(shop.dsn, [watcher], delivery=durable)
        feeds = [open_feed(hub, "items", size=10, ordered=True) for hub in hubs]
        browser = Browser()
        tab = Tab(feeds[0], browser)  # type: ignore[arg-type]
        shop("INSERT INTO items VALUES (1)")
        tab.wait(1)
        shop("INSERT INTO items (id, text) VALUES (2, repeat('x', 100000)), (3, repeat('y', 9000))")
        shop("INSERT INTO items VALUES (4)")
        assert Tab(feeds[1], browser).wait(4) == [1, 2, 3, 4]  # type: ignore[arg-type]
    finally:
        for hub in hubs:
            hub.stop()


@both
def test_the_filter_holds_for_what_was_missed(process: Process, shop: Database) -> None:
    """What it may not see stays unseen when it comes back, and moves its id all the same."""
    mine = View(visible=lambda event: event.values["tenant"] == 1)
    tab = Tab(process(), Browser(), mine)
    shop("INSERT INTO items VALUES (1, 1), (2, 2), (3, 1)")
    assert tab.wait(2) == [1, 3]
    tab.client.close()
    shop("INSERT INTO items VALUES (4, 2), (5, 1), (6, 2)")
    again = Tab(process(), tab.browser, mine)
    assert again.wait(3) == [1, 3, 5]
    shop("INSERT INTO items VALUES (7, 2)")
    before = again.browser.last_id
    again.stay()
    assert again.browser.last_id != before


@both
def test_a_named_consumer(process: Process, shop: Database) -> None:
    """Browsers of every process hear of everything, though one alone reads for the receivers."""
    tabs = [Tab(process(name="mailer"), Browser()) for _ in range(2)]
    shop("INSERT INTO items VALUES (1)")
    assert [tab.wait(1) for tab in tabs] == [[1], [1]]


@both
def test_an_id_that_is_not_ours(process: Process, shop: Database) -> None:
    """What is forged, cut, or of no such kind is a gap, and the stream goes on from there."""
    feed = process()
    good = feed.position
    data = bytearray(base64.urlsafe_b64decode(good + "=" * (-len(good) % 4)))
    forged = []
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1
        forged.append(base64.urlsafe_b64encode(changed).rstrip(b"=").decode())
    for text in [
        *forged,
        good[:-1],
        good + "A",
        "gone",
        "-",
        "é",
        "1; DROP TABLE items",
        "A" * 4096,
    ]:
        tab = Tab(feed, Browser(last_id=text))
        assert tab.wait(1) == ["unknown_id"], text
        tab.client.close()
    # Whatever was told, the gap has an id that is good.
    tab = Tab(feed, tab.browser)
    shop("INSERT INTO items VALUES (1)")
    assert tab.wait(2) == ["unknown_id", 1]


def test_an_id_of_another_database(
    process: Process, shop: Database, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id means nothing in another database, nor in another history of the same one."""
    theirs = process().position
    monkeypatch.setattr(
        "pgsignals.outbox.log.OutboxLog.surroundings",
        lambda store: ("1-2-3/4", datetime.now(timezone.utc)),
    )
    assert Tab(process(), Browser(last_id=theirs)).wait(1) == ["unknown_id"]


def test_one_from_the_future(process: Process, shop: Database) -> None:
    """A place that the database has not reached, since it has gone back in time, is a gap."""
    feed = process()
    place = feed._latest_mark().position.point
    since = type(place.since)(place.since.xmin + 1000, place.since.xmax + 1000)
    ahead = type(place)(since, place.floor, place.high, place.shed)
    assert Tab(feed, Browser(last_id=feed.codec.encode(ahead))).wait(1) == ["unknown_id"]


def turn(shop: Database) -> None:
    """Begin another partition."""
    with shop.connection.cursor() as cursor:
        tidy(cursor, segment_bytes=0)


def emptied(shop: Database) -> list[int]:
    """The partitions that can be emptied now, and are."""
    with shop.connection.cursor() as cursor:
        return tidy(cursor)


def wait_until_emptied(shop: Database) -> None:
    """Empty the first partition, as soon as everybody has read it; or let a Hub's thread do it."""

    def after() -> list[tuple[int]]:
        emptied(shop)
        return shop("SELECT segment FROM pgsignals.segments WHERE emptied_id IS NOT NULL")

    eventually(after, lambda segments: segments == [(0,)])


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Gets who has noted that later transactions write above an id, and the id."""
    made, note = Recorder(), IdBounds.note

    def noted(self: IdBounds, first: int, given_out: int) -> None:
        note(self, first, given_out)
        made((self, given_out))

    monkeypatch.setattr(IdBounds, "note", noted)
    return made


def until_noted(shop: Database, notes: Recorder, last_id: int) -> None:
    """Wait until the only process, for receivers and for browsers, has noted that of an id.

    That is done by who is awake, only now and then.
    """

    def after() -> set[IdBounds]:
        shop(names.wake_statement("awake"))
        return {bounds for bounds, given_out in notes.items if given_out >= last_id}

    eventually(after, lambda bounds: len(bounds) >= 2)


# By cursors that do not see all that is in the outbox.
UNREAD = """
SELECT count(*) FROM pgsignals.consumers AS c
WHERE EXISTS (SELECT FROM pgsignals.outbox AS o
              WHERE NOT pg_visible_in_snapshot(o.txid::text::xid8, c.snapshot::pg_snapshot))
"""


def test_what_is_no_longer_kept_is_a_gap(process: Process, shop: Database, notes: Recorder) -> None:
    """Who was away for longer than the outbox keeps what all have read is told so."""
    feed = process()
    assert shop("SELECT keep_seconds FROM pgsignals.settings") == [(60,)]
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1)")
    tab.wait(1)
    tab.client.close()
    shop("INSERT INTO items VALUES (2)")
    here = Tab(feed, Browser(last_id=tab.browser.last_id))
    assert here.wait(1) == [2]
    turn(shop)
    here.stay()
    until_noted(shop, notes, 2)
    eventually(lambda: shop(UNREAD), lambda found: found == [(0,)])
    assert emptied(shop) == []  # It is kept for a minute.
    other = process()
    assert Tab(other, Browser(last_id=tab.browser.last_id)).wait(1) == [2]
    shop("INSERT INTO items VALUES (3)")
    here.wait(2)
    here.stay()
    here.client.close()
    shop("UPDATE pgsignals.settings SET keep_seconds = 0")
    wait_until_emptied(shop)
    shop("INSERT INTO items VALUES (4)")
    assert Tab(other, tab.browser).wait(2) == [1, "retention"]
    # Who knows all that is gone misses nothing of it.
    assert Tab(process(), here.browser).wait(3) == [2, 3, 4]


def test_a_long_transaction_is_no_gap(process: Process, shop: Database, notes: Recorder) -> None:
    """A transaction that lasts has left nothing in what is emptied meanwhile."""
    feed = process()
    long = psycopg2.connect(shop.dsn)
    try:
        long.cursor().execute("SELECT pg_current_xact_id()")
        tab = Tab(feed, Browser())
        shop("INSERT INTO items VALUES (1)")
        tab.wait(1)
        turn(shop)
        until_noted(shop, notes, 1)
        shop("INSERT INTO items VALUES (2)")
        tab.wait(2)
        tab.stay()
        tab.client.close()
        assert tab.client._known.point.since.running
        shop("UPDATE pgsignals.settings SET keep_seconds = 0")
        wait_until_emptied(shop)
        shop("INSERT INTO items VALUES (3)")
        assert Tab(process(), tab.browser).wait(3) == [1, 2, 3]
    finally:
        long.close()


def test_a_trigger_that_was_made_anew(process: Process, shop: Database) -> None:
    """What was written while there was no trigger is nowhere: a gap."""
    feed = process()
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1)")
    tab.wait(1)
    feed._hub.stop()
    for name, table in shop(
        "SELECT tgname, tgrelid::regclass::text FROM pg_trigger WHERE NOT tgisinternal"
    ):
        shop(f'DROP TRIGGER "{name}" ON {table}')
    shop("INSERT INTO items VALUES (2)")
    again = Tab(process(), tab.browser)
    assert again.wait(2) == [1, "reinstalled"]
    shop("INSERT INTO items VALUES (3)")
    assert again.wait(3) == [1, "reinstalled", 3]


def test_statements_that_found_the_outbox_full(process: Process, shop: Database) -> None:
    """What writers left out while nobody lived is a gap."""
    feed = process()
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1)")
    tab.wait(1)
    feed._hub.stop()
    # A session ends a little after its client has.
    eventually(
        lambda: shop(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s"
            " AND objid = %s AND database = (SELECT oid FROM pg_database"
            " WHERE datname = current_database())",
            (names.LOCK_CLASS, names.ALIVE_LOCK),
        ),
        lambda found: found == [(0,)],
    )
    # Of fifty writers, one looks whether it is full.
    [(most,)] = shop("SELECT retention_bytes FROM pgsignals.settings")
    shop("UPDATE pgsignals.settings SET retention_bytes = 0")
    shop("SELECT setval('pgsignals.outbox_full', 1)")
    shop("INSERT INTO items VALUES (2)")
    shop("SELECT setval('pgsignals.outbox_full', 0)")
    shop("UPDATE pgsignals.settings SET retention_bytes = %s", [most])
    assert Tab(process(), tab.browser).wait(2) == [1, "retention"]


@pytest.mark.parametrize("granted", [True, False])
def test_a_role_that_does_not_own_the_schema(
    shop: Database, server: Server, caplog: pytest.LogCaptureFixture, granted: bool
) -> None:
    """With the documented grants it streams; without those for streams too, less exactly."""
    role = f"consumer_{shop.connection.info.dbname}"
    owner = Hub()
    owner.start(shop.dsn, [ITEMS], delivery="outbox")
    shop(f"CREATE ROLE {role} LOGIN; GRANT SELECT ON items TO {role}")
    hubs = [Hub(), Hub()]
    try:
        for grant in documented_grants("consumer"):
            if granted or ("keep_seconds" not in grant and "era" not in grant):
                shop(f"GRANT {grant} TO {role}")
        feeds: list[ResumableFeed] = []
        for hub in hubs:
            dsn = server.dsn(shop.connection.info.dbname, role)
            hub.start(dsn, [ITEMS], delivery="outbox", install="check", prune=False)
            feed = open_feed(hub, "items", size=10, ordered=True)
            assert isinstance(feed, ResumableFeed)
            feeds.append(feed)
        tab = Tab(feeds[0], Browser())
        shop("INSERT INTO items VALUES (1)")
        tab.wait(1)
        tab.client.close()
        shop("INSERT INTO items VALUES (2)")
        expected = [1, 2] if granted else [1, "unknown_id"]
        assert Tab(feeds[1], Browser(last_id=tab.browser.last_id)).wait(1) == expected[1:]
        assert Tab(feeds[0], tab.browser).wait(2) == [1, 2]
        warned = [each.message for each in caplog.records if "GRANT" in each.message]
        assert bool(warned) is not granted
    finally:
        for hub in [*hubs, owner]:
            hub.stop()
        shop(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


@both
def test_a_broken_watcher(process: Process, shop: Database, looks: Recorder) -> None:
    """A change that the trigger could not describe is a gap, now and for who comes back."""
    feed = process()
    # The Hub's own source and its tail each look once when they begin. A look that finds the
    # watcher broken announces that as well.
    eventually(lambda: len({id(watch) for watch in looks.items}), lambda count: count == 2)
    tab, away = Tab(feed, Browser()), Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1)")
    assert tab.wait(1) == away.wait(1)
    away.client.close()
    shop("ALTER TABLE items RENAME COLUMN n TO m")
    shop("INSERT INTO items VALUES (2)")
    assert tab.wait(2) == [1, "watcher_broken"]
    shop("ALTER TABLE items RENAME COLUMN m TO n")
    shop("INSERT INTO items VALUES (3)")
    assert tab.wait(3) == [1, "watcher_broken", 3]
    assert Tab(feed, Browser(last_id=away.browser.last_id)).wait(2) == ["watcher_broken", 3]
    assert Tab(process(), away.browser).wait(3) == [1, "watcher_broken", 3]


@both
def test_the_connection_is_lost(process: Process, shop: Database) -> None:
    """Those who are connected get all that happened meanwhile, once, and no gap."""
    feed = process()
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1)")
    tab.wait(1)
    source = feed.tail.source
    shop(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    shop("INSERT INTO items SELECT generate_series(2, 500)")
    assert tab.wait(500) == list(range(1, 501))
    assert source.reconnects >= 1


def test_a_server_that_does_not_answer(
    process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser that cannot catch up now is sent away with its place, and comes back."""
    tab = Tab(process(), Browser())
    shop("INSERT INTO items VALUES (1)")
    tab.wait(1)
    tab.client.close()
    shop("INSERT INTO items VALUES (2)")
    feed = process()
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise psycopg2.OperationalError("gone")

        patch.setattr(feed.tail, "read", fail)
        again = Tab(feed, tab.browser)
        assert again.more() == b""
        assert again.client.ended
    assert Tab(feed, tab.browser).wait(2) == [1, 2]


@both
def test_wandering_browsers(process: Process, shop: Database) -> None:
    """Whatever commits how late, and wherever a browser or a session breaks off: all once."""
    rounds, records = 60, 6
    shop("INSERT INTO items SELECT generate_series(1, %s), 1, 0", (records,))
    feeds = [process(size=20), process(size=20)]
    starts = [Browser() for _ in range(2)]
    for browser in starts:
        Tab(feeds[0], browser).client.close()
    seed = random.randrange(1 << 30)
    view = View(data=lambda event: [event.id, event.values["n"]])

    def write(number: int) -> None:
        chance = random.Random(seed + number)
        connection = psycopg2.connect(shop.dsn)
        try:
            for _ in range(rounds):
                record = 1 + number + 3 * chance.randrange(records // 3)
                with connection, connection.cursor() as cursor:
                    for _ in range(chance.randrange(1, 4)):
                        cursor.execute("UPDATE items SET n = n + 1 WHERE id = %s", (record,))
                        # Transactions of various lengths, so that they overlap in every way.
                        time.sleep(chance.choice((0, 0, 0.002, 0.01)))
        finally:
            connection.close()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()

    def wander(browser: Browser, chance: random.Random) -> None:
        expected: dict[int, int] | None = None

        def has_all() -> bool:
            # All may have come while a writer was about to end: then nothing more comes.
            nonlocal expected
            if expected is None and not any(each.is_alive() for each in writers):
                expected = dict(shop("SELECT id, n FROM items"))
            return expected is not None and len(browser.messages) >= sum(expected.values())

        while True:
            tab = Tab(chance.choice(feeds), browser, view)
            if chance.random() < 0.05:
                shop(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'pgsignals' AND datname = current_database()"
                )
            for _ in range(chance.randrange(1, 6)):
                if has_all():
                    return
                piece = tab.more(has_all).decode()
                frames = [f"{frame}\n\n".encode() for frame in piece.split("\n\n")]
                cut = chance.randrange(len(frames) + 1)
                browser.receive(b"".join(frames[:cut]))
                if cut < len(frames) - 1:
                    break
            tab.client.close()

    try:
        for number, browser in enumerate(starts):
            wander(browser, random.Random(seed - number))
    finally:
        for writer in writers:
            writer.join()
    for browser in starts:
        seen: dict[int, list[int]] = {}
        for kind, data in browser.messages:
            assert kind == "message", (seed, data)
            seen.setdefault(data[0], []).append(data[1])
        expected = dict(shop("SELECT id, n FROM items"))
        assert seen == {record: list(range(1, n + 1)) for record, n in expected.items() if n}, seed


@both
def test_the_child_of_a_fork(process: Process, shop: Database, durable: Delivery) -> None:
    """It gives up what it has inherited, may have streams of its own, and the parent's go on."""
    feed = process()
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1)")
    tab.wait(1)
    shop("INSERT INTO items VALUES (2)")
    Tab(feed, Browser(last_id=tab.browser.last_id)).wait(1)
    with feed._lock, feed.tail._condition:
        child = os.fork()
    if child == 0:
        code = 1
        try:
            hub = feed._hub
            assert feed.closed
            assert tab.client.read()
            assert not tab.client.read()
            assert tab.client.ended
            hub.start(shop.dsn, [ITEMS], delivery=durable)
            own = open_feed(hub, "items", size=10, ordered=True)
            assert Tab(own, Browser(last_id=tab.browser.last_id)).wait(1) == [2]
            hub.stop()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    shop("INSERT INTO items VALUES (3)")
    assert tab.wait(3) == [1, 2, 3]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_postgresql_restarts(mode: StopMode) -> None:
    """A restart costs nobody anything; after a crash, which may take back transactions, a gap."""
    with Server() as own:
        dsn = own.create_database()
        before = Database(dsn)
        before("CREATE TABLE items (id bigint PRIMARY KEY, tenant int, n int)")
        hub = Hub()
        hub.start(dsn, [ITEMS], delivery="outbox", heartbeat=1.0)
        try:
            feed = open_feed(hub, "items", size=100, ordered=True)
            assert isinstance(feed, ResumableFeed)
            tab, away = Tab(feed, Browser()), Tab(feed, Browser())
            before("INSERT INTO items VALUES (1)")
            assert (tab.wait(1), away.wait(1)) == ([1], [1])
            away.client.close()
            before("INSERT INTO items VALUES (2)")
            assert tab.wait(2) == [1, 2]
            before.connection.close()
            own.restart(mode)
            after = Database(dsn)
            after("INSERT INTO items VALUES (3)")
            if mode == "fast":
                assert tab.wait(3) == [1, 2, 3]
                again = Tab(feed, away.browser)
                assert again.wait(3) == [1, 2, 3]
            else:
                assert tab.wait(3) == [1, 2, "restored"]
                assert Tab(feed, away.browser).wait(2)[1] == "unknown_id"
                after("INSERT INTO items VALUES (4)")
                while 4 not in told(tab.browser):
                    tab.browser.receive(tab.more())
            after.connection.close()
        finally:
            hub.stop()


def test_a_database_that_does_not_answer(shop: Database, hub: Hub) -> None:
    """Who comes back and reads the outbox again waits alone: the feed goes on, and ends."""
    given = parse_dsn(shop.dsn)
    with Proxy("127.0.0.1", int(given["port"])) as proxy:
        dsn = make_dsn(**given | {"host": "127.0.0.1", "port": proxy.port})
        hub.start(dsn, [ITEMS], delivery="outbox")
        feed = open_feed(hub, "items", size=3, ordered=True)
        assert isinstance(feed, ResumableFeed)
        tab = Tab(feed, Browser())
        shop("INSERT INTO items VALUES (1), (2), (3)")
        tab.wait(3)
        first = feed.connect(None, lambda: None)
        shop("INSERT INTO items VALUES (4), (5), (6)")
        tab.wait(6)
        shop("INSERT INTO items VALUES (7)")
        tab.wait(7)
        eventually(lambda: proxy.connections, lambda count: count == 2)
        proxy.stall()
        pieces: list[bytes] = []
        reading = threading.Thread(target=lambda: pieces.append(first.read()))
        reading.start()
        eventually(lambda: proxy.connections, lambda count: count == 3)
        feed.close()
        proxy.resume()
        reading.join(DEADLINE)
        assert b'"id":4' in pieces[0]
