"""Streams in WAL delivery: by a log that the server keeps for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from itertools import groupby
from typing import Any

import psycopg2
import pytest

import pgsignals
from pgsignals import Hub, StateError
from pgsignals.contrib.event_stream import View
from pgsignals.contrib.replayed import LogFeed
from pgsignals.contrib.resumable import open_feed
from pgsignals.core.transport import Transport
from pgsignals.overview.checks.wal import examine_wal
from pgsignals.sources import wal_tail
from pgsignals.testing import Server
from pgsignals.testing.server import StopMode
from pgsignals.triggers.names import streams_slot
from pgsignals.wal import following, reader
from pgsignals.wal.following import keep_near
from pgsignals.wal.log import WalLog
from pgsignals.wal.places import Place
from tests.conftest import Database
from tests.event_source import Browser, Tab, told
from tests.grants import documented_grants
from tests.inside import run
from tests.waiting import eventually

ITEMS = pgsignals.watch("items", "inserted", "updated", extra=["n"])
# Rows and messages of the same changes: a label of each kind, and a table without a key.
MIXED = [
    ITEMS,
    pgsignals.watch("items", "inserted", "updated", label="again", extra=["n"]),
    pgsignals.watch("items", "inserted", when="NEW.n >= 0", label="conditional", extra=["n"]),
    pgsignals.watch("notes", "updated", extra=["n"]),
]
LABELS = ["items", "again", "conditional", "notes"]


@pytest.fixture
def shop(each_db: Database) -> Database:
    """A database with a table, and one without a key."""
    each_db("CREATE TABLE items (id bigint PRIMARY KEY, n int); CREATE TABLE notes (n int)")
    return each_db


@pytest.fixture
def process(shop: Database) -> Iterator[Callable[..., LogFeed]]:
    """Starts Hubs, each as another process would, and gives a feed of each."""
    hubs: list[Hub] = []

    def start(*targets: str, watchers: Any = (ITEMS,), size: int = 1000, **options: Any) -> LogFeed:
        hub = Hub()
        hubs.append(hub)
        hub.start(shop.dsn, watchers, delivery="wal", **options)
        feed = open_feed(hub, *(targets or ("items",)), size=size, ordered=True)
        assert isinstance(feed, LogFeed)
        return feed

    yield start
    for hub in hubs:
        hub.stop()


Process = Callable[..., LogFeed]


def slot_of(shop: Database) -> str:
    """The name of the slot of streams."""
    return streams_slot(shop.connection.info.dbname)


def deployed(feed: LogFeed, shop: Database) -> None:
    """Stop the only process, and wait until the server has seen its end."""
    feed._hub.stop()
    eventually(
        lambda: shop(
            "SELECT count(*) FROM pg_replication_slots"
            " WHERE temporary AND database = current_database()"
        ),
        lambda found: found == [(0,)],
    )


def until(tab: Tab, last: int) -> list[Any]:
    """What the browser is told up to an id; what is told twice, one after the other, once."""
    heard: list[Any] = []
    while not heard or heard[-1] != last:
        heard = tab.wait(len(heard) + 1)
    return [each for number, each in enumerate(heard) if number == 0 or each != heard[number - 1]]


def test_a_deploy(process: Process, shop: Database) -> None:
    """What was committed while no process ran comes to who was away, once, and in order."""
    feed = process()
    tab = Tab(feed, Browser())
    shop("INSERT INTO items SELECT generate_series(1, 3), 0")
    tab.wait(3)
    deployed(feed, shop)
    shop("INSERT INTO items SELECT generate_series(4, 2500), 0")
    shop("UPDATE items SET n = 1 WHERE id = 2")
    feed = process()
    again = Tab(feed, tab.browser)
    shop("INSERT INTO items VALUES (2501, 0)")
    assert again.wait(2502) == [*range(1, 2501), 2, 2501]
    # Who comes for the first time hears of what happens from now on.
    fresh = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (2502, 0)")
    assert fresh.wait(1) == [2502]
    [(plugin, temporary, failover)] = shop(
        "SELECT plugin, temporary, coalesce(to_jsonb(s) ->> 'failover', 'false')"
        " FROM pg_replication_slots AS s WHERE slot_name = %s",
        [slot_of(shop)],
    )
    assert (plugin, temporary, failover) == ("pgoutput", False, "false")


def test_it_waits_for_no_transaction(process: Process, shop: Database) -> None:
    """A process that streams begins at once, though somebody's transaction goes on and on."""
    deployed(process(name="mailer"), shop)
    writer = psycopg2.connect(shop.dsn)
    try:
        writer.cursor().execute("INSERT INTO notes VALUES (1)")
        tab = Tab(process(name="mailer"), Browser())
        shop("INSERT INTO items VALUES (1, 0)")
        assert tab.wait(1) == [1]
    finally:
        writer.close()


def test_the_order_is_the_same_in_every_process(
    process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever pages a transaction is read, wherever the connection of a browser breaks off."""
    view = View(data=lambda event: {"id": [event.label, event.table, event.op, event.values["n"]]})
    feed = process(*LABELS, watchers=MIXED)
    whole = Browser()
    tab = Tab(feed, whole, view)
    with shop.connection.cursor() as cursor:
        cursor.execute(
            "BEGIN; INSERT INTO items SELECT n, n FROM generate_series(1, 40) AS n;"
            "INSERT INTO notes SELECT n FROM generate_series(1, 5) AS n;"
            "UPDATE notes SET n = n + 100; UPDATE items SET n = n + 1000 WHERE id <= 10;"
            "INSERT INTO items VALUES (41, 41); COMMIT"
        )
    expected = 3 * 40 + 5 + 2 * 10 + 3
    pieces = b""
    while len(whole.messages) < expected:
        piece = tab.more()
        whole.receive(piece)
        pieces += piece
    frames = [frame + b"\n\n" for frame in pieces.split(b"\n\n") if frame]
    assert len(frames) == expected
    for page in (1, 7, 1000):
        monkeypatch.setattr(reader, "PAGE_CHANGES", page)
        other = process(*LABELS, watchers=MIXED)
        for cut in (1, 2, 3, 50, 119, 120, 123, 126, 140, expected - 1):
            browser = Browser()
            browser.receive(b"".join(frames[:cut]))
            again = Tab(other, browser, view)
            again.wait(expected)
            assert told(browser) == told(whole), (page, cut)
            again.client.close()
        other._hub.stop()


def test_a_change_that_cannot_be_read(
    process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Gap stands where the change does, in whatever pages others read it."""
    shop("ALTER TABLE items REPLICA IDENTITY FULL")
    watchers = [("items", "inserted"), pgsignals.watch("items", "updated", columns=["n"])]
    feed = process(watchers=watchers)
    away, tab = Tab(feed, Browser()), Tab(feed, Browser())
    away.client.close()
    shop("INSERT INTO items SELECT generate_series(1, 4), 0")
    tab.wait(4)
    deployed(feed, shop)
    # Without the old row, or of it the key alone, nobody knows whether the column changed.
    shop("ALTER TABLE items REPLICA IDENTITY DEFAULT")
    shop(
        "UPDATE items SET n = 1 WHERE id = 1; INSERT INTO items VALUES (102, 0);"
        "UPDATE items SET n = 1, id = 103 WHERE id = 3; INSERT INTO items VALUES (104, 0)"
    )
    shop("ALTER TABLE items REPLICA IDENTITY FULL")
    shop("INSERT INTO items VALUES (5, 0)")
    expected = [1, 2, 3, 4, "watcher_broken", 102, "watcher_broken", 104, 5]
    for page in (1, 3, 1000):
        monkeypatch.setattr(reader, "PAGE_CHANGES", page)
        other = process(watchers=watchers)
        for browser in (away.browser, tab.browser):
            again = Tab(other, Browser(last_id=browser.last_id))
            last = expected[4:] if browser is tab.browser else expected
            # A Gap is told once for each page at most.
            assert until(again, 5) == last, page
        other._hub.stop()


def test_the_server_has_given_the_slot_up(process: Process, shop: Database) -> None:
    """Where the slot of streams is gone, who was away is told; the next process makes it anew."""
    feed = process()
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1, 0)")
    tab.wait(1)
    deployed(feed, shop)
    shop("SELECT pg_drop_replication_slot(%s)", [slot_of(shop)])
    shop("INSERT INTO items VALUES (2, 0)")
    again = Tab(process(), tab.browser)
    assert again.wait(2) == [1, "retention"]
    shop("INSERT INTO items VALUES (3, 0)")
    assert again.wait(3) == [1, "retention", 3]
    assert shop("SELECT FROM pg_replication_slots WHERE slot_name = %s", [slot_of(shop)])


def test_the_connection_is_lost(process: Process, shop: Database) -> None:
    """What is read again is kept once, so that who comes back finds each event once."""
    feed = process()
    tab, away = Tab(feed, Browser()), Tab(feed, Browser())
    away.client.close()
    shop("INSERT INTO items SELECT generate_series(1, 50), 0")
    tab.wait(50)
    shop(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    shop("INSERT INTO items SELECT generate_series(51, 60), 0")
    assert tab.wait(60) == list(range(1, 61))
    assert feed.tail.source.reconnects >= 1
    places = [place for place, _ in feed.tail._items]
    assert places == sorted(set(places))
    assert Tab(feed, away.browser).wait(60) == list(range(1, 61))


def test_another_history(process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a promotion who is connected is told, and has an id of the new history."""
    feed = process()
    tab, away = Tab(feed, Browser()), Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1, 0)")
    assert tab.wait(1) == away.wait(1)
    away.client.close()
    surroundings = WalLog.surroundings

    def promoted(log: WalLog) -> tuple[str, datetime]:
        epoch, clock = surroundings(log)
        return f"{epoch}9", clock

    monkeypatch.setattr(WalLog, "surroundings", promoted)
    shop(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    assert tab.wait(2) == [1, "restored"]
    tab.client.close()
    eventually(lambda: feed.tail._caught_up, bool)
    assert Tab(feed, away.browser).wait(2) == [1, "unknown_id"]
    shop("INSERT INTO items VALUES (2, 0)")
    assert until(Tab(feed, tab.browser), 2) == [1, "restored", 2]
    again = Tab(process(), tab.browser)
    shop("INSERT INTO items VALUES (3, 0)")
    assert until(again, 3) == [1, "restored", 2, 3]


def test_the_connection_is_lost_with_the_slot(process: Process, shop: Database) -> None:
    """Those who are connected are told of what nobody keeps, and hear of what follows."""
    feed = process()
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1, 0)")
    tab.wait(1)
    shop("SELECT pg_drop_replication_slot(%s)", [slot_of(shop)])
    shop(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    shop("INSERT INTO items VALUES (2, 0)")
    eventually(lambda: feed.tail.source.reconnects, lambda count: count >= 1)
    eventually(lambda: feed.tail._caught_up, bool)
    shop("INSERT INTO items VALUES (3, 0)")
    assert until(tab, 3) in ([1, "retention", 3], [1, "retention", 2, 3])


def test_it_is_kept_for_a_while(
    process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot follows the present at the distance that the settings say, and no further behind."""
    feed = process()
    name = slot_of(shop)

    def confirmed() -> int:
        [(found,)] = shop(
            "SELECT (confirmed_flush_lsn - '0/0')::bigint FROM pg_replication_slots"
            " WHERE slot_name = %s",
            [name],
        )
        return int(found)

    def look_after() -> int:
        with shop.connection.cursor() as cursor:
            feed.tail.look_after(cursor)
        return confirmed()

    begin = confirmed()
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1, 0)")
    tab.wait(1)
    assert look_after() == begin
    monkeypatch.setattr(following, "MOST_BYTES", 0)
    assert look_after() > begin
    monkeypatch.undo()
    shop("INSERT INTO items VALUES (2, 0)")
    tab.wait(2)
    middle = look_after()
    monkeypatch.setattr(feed.tail, "_keep_seconds", 0)
    shop("INSERT INTO items VALUES (3, 0)")
    tab.wait(3)
    eventually(look_after, lambda found: found > middle)
    tab.client.close()
    # Who was away for longer is told so by a process that begins; the old one still has it.
    early = Browser()
    assert Tab(feed, Browser(last_id=tab.browser.last_id)).client.read() == b""
    early.last_id = feed.tail.codec.encode(Place(begin), 0)  # type: ignore[union-attr]
    assert Tab(feed, Browser(last_id=early.last_id)).wait(3) == [1, 2, 3]
    assert Tab(process(), early).wait(1) == ["retention"]


def test_a_slot_that_is_far_behind(
    process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process does not read for minutes before its first stream: the slot is made anew."""
    feed = process()
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1, 0)")
    tab.wait(1)
    deployed(feed, shop)
    shop("INSERT INTO items SELECT generate_series(2, 1000), 0")
    monkeypatch.setattr(following, "MOST_BYTES", 1000)
    assert Tab(process(), tab.browser).wait(2) == [1, "retention"]


def test_a_process_keeps_so_many(
    process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser that is further behind than a process has events is told so, however it is late."""
    monkeypatch.setattr(wal_tail, "KEPT", 10)
    monkeypatch.setattr("pgsignals.contrib.replayed.KEPT", 10)
    feed = process(size=10)
    slow, tab, away = Tab(feed, Browser()), Tab(feed, Browser()), Tab(feed, Browser())
    for number in range(1, 31):
        shop("INSERT INTO items VALUES (%s, 0)", [number])
        tab.wait(number)
    assert slow.wait(1) == ["slow"]
    assert Tab(feed, away.browser).wait(1) == ["retention"]
    recent = Browser(last_id=feed._ring.entries[20].id)
    assert Tab(feed, recent).wait(9) == list(range(22, 31))
    shop("INSERT INTO items VALUES (31, 0)")
    assert slow.wait(2) == ["slow", 31]


def test_one_that_is_ahead_of_this_process(
    process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets nothing twice from a process that has not read so far; the future is unknown."""
    feed, behind = process(), process()
    tab = Tab(feed, Browser())
    with monkeypatch.context() as patch:
        patch.setattr(behind, "put", lambda items, upto: None)
        shop("INSERT INTO items VALUES (1, 0)")
        assert tab.wait(1) == [1]
        tab.client.close()
        again = Tab(behind, tab.browser)
        assert again.client.read() == b""
    shop("INSERT INTO items VALUES (2, 0)")
    assert again.wait(2) == [1, 2]
    codec = feed.tail.codec
    assert codec is not None
    future = codec.encode(Place(1 << 60), 0)
    assert Tab(feed, Browser(last_id=future)).wait(1) == ["unknown_id"]


def test_a_table_that_was_not_published(process: Process, shop: Database) -> None:
    """What was written while the table was in no publication is nowhere: a gap."""
    feed = process()
    tab = Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1, 0)")
    tab.wait(1)
    deployed(feed, shop)
    shop("ALTER PUBLICATION pgsignals_inserts DROP TABLE items")
    shop("INSERT INTO items VALUES (2, 0)")
    again = Tab(process(), tab.browser)
    assert again.wait(2) == [1, "reinstalled"]
    shop("INSERT INTO items VALUES (3, 0)")
    assert again.wait(3) == [1, "reinstalled", 3]


def test_messages_that_could_not_be_written(process: Process, shop: Database) -> None:
    """It is a gap for who is connected, and for who comes back, and not again later."""

    def without_repeats(messages: list[Any]) -> list[Any]:
        # A loss is told once more when the writers have ended that were under way.
        return [each for each, _ in groupby(messages)]

    feed = process()
    tab, away = Tab(feed, Browser()), Tab(feed, Browser())
    shop("INSERT INTO items VALUES (1, 0)")
    assert tab.wait(1) == away.wait(1)
    away.client.close()
    shop("SELECT nextval('pgsignals.outbox_shed')")
    assert without_repeats(tab.wait(2)) == [1, "retention"]
    tab.client.close()
    shop("INSERT INTO items VALUES (2, 0)")
    assert without_repeats(until(Tab(feed, tab.browser), 2)) == [1, "retention", 2]
    shop("INSERT INTO items VALUES (3, 0)")
    assert without_repeats(until(Tab(process(), tab.browser), 3)) == [1, "retention", 2, 3]
    assert without_repeats(Tab(process(), away.browser).wait(2)) == [1, "retention"]


def test_without_a_bound(connect: Callable[[str], Database]) -> None:
    """There the server keeps nothing for streams, unless that is allowed; it is said what lacks."""
    with Server(settings={"max_slot_wal_keep_size": "-1"}) as own:
        shop = connect(own.create_database())
        shop("CREATE TABLE items (id bigint PRIMARY KEY, n int)")
        for allowed in (False, True):
            hub = Hub()
            hub.start(shop.dsn, [ITEMS], delivery="wal", allow_unbounded_wal=allowed)
            try:
                feed = open_feed(hub, "items", size=10, ordered=True)
                tab = Tab(feed, Browser())
                shop("INSERT INTO items VALUES (%s, 0)", [int(allowed)])
                assert tab.wait(1) == [int(allowed)]
            finally:
                hub.stop()
            kept = shop("SELECT FROM pg_replication_slots WHERE slot_name = %s", [slot_of(shop)])
            assert bool(kept) is allowed


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_postgresql_restarts(mode: StopMode, each_version: int) -> None:
    """Neither a restart nor a crash costs anybody anything: only what is on disk was given."""
    with Server(version=each_version) as own:
        dsn = own.create_database()
        before = Database(dsn)
        before("CREATE TABLE items (id bigint PRIMARY KEY, n int)")
        hub = Hub()
        hub.start(dsn, [ITEMS], delivery="wal", heartbeat=1.0)
        try:
            feed = open_feed(hub, "items", size=100, ordered=True)
            tab, away = Tab(feed, Browser()), Tab(feed, Browser())
            before("INSERT INTO items VALUES (1, 0)")
            assert (tab.wait(1), away.wait(1)) == ([1], [1])
            away.client.close()
            before("INSERT INTO items VALUES (2, 0)")
            assert tab.wait(2) == [1, 2]
            before.connection.close()
            own.restart(mode)
            after = Database(dsn)
            after("INSERT INTO items VALUES (3, 0)")
            assert tab.wait(3) == [1, 2, 3]
            assert Tab(feed, away.browser).wait(3) == [1, 2, 3]
            after.connection.close()
        finally:
            hub.stop()


def test_what_an_operator_sees(process: Process, shop: Database) -> None:
    """The slot of streams is nobody's consumer: it is listed, and well until it is late."""
    feed = process()
    deployed(feed, shop)

    def slots() -> Any:
        with shop.connection.cursor() as cursor:
            found = {each.check: each for each in examine_wal(cursor, Transport.WAL)}
        return found["slots"]

    eventually(slots, lambda finding: finding.level == "ok")
    listed = run("consumers", "list", dsn=shop.dsn)
    assert f"pg_drop_replication_slot('{slot_of(shop)}')" in "\n".join(listed.err)
    with shop.connection.cursor() as cursor:
        keep_near(cursor, slot_of(shop), None)
        assert shop("SELECT FROM pg_replication_slots WHERE slot_name = %s", [slot_of(shop)])
    assert run("uninstall", "--schema", "--yes", dsn=shop.dsn).code == 0
    assert shop("SELECT FROM pg_replication_slots WHERE database = current_database()") == []


def test_nobody_streams_any_more(
    process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any process gives the slot up once it is far behind, and makes it anew while it streams."""
    feed = process()
    name = slot_of(shop)
    there = "SELECT FROM pg_replication_slots WHERE slot_name = %s"
    shop("SELECT pg_drop_replication_slot(%s)", [name])
    with shop.connection.cursor() as cursor:
        feed.tail.look_after(cursor)
        assert shop(there, [name])
        monkeypatch.setattr(following, "MOST_BYTES", 1)
        shop("INSERT INTO items SELECT generate_series(1, 100), 0")
        keep_near(cursor, name, None)
    assert not shop(there, [name])


def test_a_role_that_only_reads(
    shop: Database, each_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """With the documented grants and REPLICATION a role streams, and looks after the slot."""
    role = f"consumer_{shop.connection.info.dbname}"
    owner = Hub()
    owner.start(shop.dsn, [ITEMS], delivery="wal")
    shop(f"CREATE ROLE {role} LOGIN REPLICATION; GRANT SELECT ON items TO {role}")
    hub = Hub()
    try:
        for grant in documented_grants("consumer"):
            shop(f"GRANT {grant} TO {role}")
        dsn = each_server.dsn(shop.connection.info.dbname, role)
        hub.start(dsn, [ITEMS], delivery="wal", install="check", prune=False)
        feed = open_feed(hub, "items", size=10, ordered=True)
        assert isinstance(feed, LogFeed)
        tab = Tab(feed, Browser())
        shop("INSERT INTO items VALUES (1, 0)")
        assert tab.wait(1) == [1]
        connection = psycopg2.connect(dsn)
        connection.autocommit = True
        with closing(connection), connection.cursor() as cursor:
            feed.tail.look_after(cursor)
            keep_near(cursor, slot_of(shop), tab.client._known.place.lsn)
        hub.stop()
        hub.start(dsn, [ITEMS], delivery="wal", install="check", prune=False)
        again = open_feed(hub, "items", size=10, ordered=True)
        shop("INSERT INTO items VALUES (2, 0)")
        assert Tab(again, tab.browser).wait(2) == [1, 2]
        assert not [each for each in caplog.records if "GRANT" in each.message]
    finally:
        hub.stop()
        owner.stop()
        shop(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_a_hub_that_is_stopped_meanwhile(
    process: Process, shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for the present of a process that ends is told at once."""
    feed = process()
    feed.tail.disconnected(OSError("gone"))
    began = time.monotonic()
    monkeypatch.setattr(feed.tail, "ended", True)
    with pytest.raises(StateError):
        feed.tail.attach(feed)
    assert time.monotonic() - began < 5
