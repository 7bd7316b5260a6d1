"""Sources whose knowledge of a table or its triggers is of the past: they go on hearing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from psycopg2.extensions import parse_dsn

from pgsignals import Hub, watch
from pgsignals.contrib.resumable import ResumableFeed, open_feed
from pgsignals.hub.hub import Delivery
from pgsignals.hub.setup import Setup
from pgsignals.sources.trigger_watch import TriggerWatch
from tests.broadcasters import Broker
from tests.conftest import DEADLINE, Database, Recorder
from tests.event_source import Browser, Tab
from tests.forked import run
from tests.grants import installer as installer
from tests.hub_parts import relay_source
from tests.table_changes import CHANGES, SHAPE, Change, covering, name_of, now
from tests.waiting import eventually

THERE = CHANGES["made partitioned"].statements
AND_BACK = (
    "ALTER TABLE orders DETACH PARTITION legacy; DROP TABLE orders;"
    "ALTER TABLE legacy RENAME TO orders"
)


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has something done once, before or after a method is called the next time."""

    def plan(owner: type, name: str, act: Callable[[], object], *, after: bool = False) -> None:
        method = getattr(owner, name)

        def called(*args: Any, **options: Any) -> Any:
            monkeypatch.setattr(owner, name, method)
            if not after:
                act()
            found = method(*args, **options)
            if after:
                act()
            return found

        monkeypatch.setattr(owner, name, called)

    return plan


def test_another_table_while_it_starts(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    delivery: Delivery,
    meanwhile: Callable[..., None],
) -> None:
    """A table that is another for as long as the triggers are made is heard once it is back."""
    each_db(f"CREATE TABLE orders {SHAPE}")
    heard = Recorder()
    hub.subscribe(heard, "orders", "inserted")

    def put_back() -> None:
        each_db(AND_BACK)
        run("install", "orders:inserted", "--delivery", delivery, dsn=each_dsn)

    meanwhile(Setup, "define", lambda: each_db(THERE), after=True)
    meanwhile(TriggerWatch, "begin", put_back)
    hub.start(each_dsn, [("orders", "inserted")], delivery=delivery, name=name_of(delivery))
    each_db("INSERT INTO orders (id) VALUES (1)")
    [event] = heard.wait(1)
    assert event.id[0] == 1


@pytest.mark.usefixtures("by_triggers")
def test_a_trigger_that_nobody_had_made_before(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery, installer: str
) -> None:
    """A trigger that could not be made when the source connected is heard once it is there."""
    each_db(f"CREATE TABLE orders {SHAPE}")
    role = parse_dsn(installer)["user"]
    each_db(f"GRANT SELECT, TRIGGER ON orders TO {role}")
    heard, gaps = Recorder(), Recorder()
    hub.subscribe(heard, "orders", "inserted")
    hub.on_gap(gaps)
    hub.start(
        installer,
        [watch("orders", "inserted", extra=["note"])],
        delivery=delivery,
        name=name_of(delivery),
        listen_dsn=each_dsn,
        heartbeat=0.2,
    )
    each_db(f"REVOKE TRIGGER ON orders FROM {role}")
    each_db("ALTER TABLE orders ALTER note TYPE int USING NULL")
    eventually(lambda: hub.health().reason, lambda reason: "events are missing" in reason)
    lost_at = now(each_db)
    each_db("INSERT INTO orders (id, note) VALUES (1, 1)")
    each_db(f"GRANT TRIGGER ON orders TO {role}")
    eventually(lambda: list(gaps.items), lambda found: covering(found, lost_at))
    eventually(lambda: hub.health().reason, lambda reason: not reason)
    each_db("INSERT INTO orders (id, note) VALUES (2, 2)")
    [event] = heard.wait_until(lambda event: event.id[0] == 2)
    assert event.values == {"note": 2}


def test_a_loss_that_another_process_has_marked(
    hub: Hub, each_dsn: str, each_db: Database, meanwhile: Callable[..., None]
) -> None:
    """It is announced by one whose own triggers are what they were all the time."""
    each_db(f"CREATE TABLE orders {SHAPE}")
    gaps, looked = Recorder(), threading.Event()
    hub.on_gap(gaps)
    lost_at = now(each_db)
    options: dict[str, Any] = {"name": "mailer", "heartbeat": 0.2}
    hub.start(each_dsn, ["orders"], delivery="outbox", **options)
    meanwhile(TriggerWatch, "look", looked.set, after=True)
    looked.wait(DEADLINE)
    each_db(
        "UPDATE pgsignals.consumers SET installation = '', verified_at = %s, acknowledged_at = %s",
        (lost_at, lost_at),
    )
    eventually(lambda: list(gaps.items), lambda found: covering(found, lost_at))
    eventually(
        lambda: each_db("SELECT installation FROM pgsignals.consumers"),
        lambda found: found != [("",)],
    )


@pytest.fixture(params=["made anew", "made partitioned"])
def change(request: pytest.FixtureRequest) -> Change:
    """One that leaves the trigger's definition as it is, and one that asks for another."""
    return CHANGES[request.param]


def hold_back(monkeypatch: pytest.MonkeyPatch, watch: TriggerWatch, until: threading.Event) -> None:
    """Have one source look at its triggers no more before something has happened."""
    look = TriggerWatch.look

    def late(self: TriggerWatch, *args: Any) -> Any:
        assert self is not watch or until.wait(DEADLINE)
        return look(self, *args)

    monkeypatch.setattr(TriggerWatch, "look", late)


def test_a_relay_whose_hub_has_noticed_first(
    hub: Hub, each_dsn: str, each_db: Database, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker gets what a changed table has, too, when the receivers' source saw that first."""
    each_db(f"CREATE TABLE orders {SHAPE}")
    broker, seen = Broker(), threading.Event()
    hub.on("orders", "inserted")(Recorder())
    options: dict[str, Any] = {"name": "mailer", "heartbeat": 0.2, "backends": [broker]}
    hub.start(each_dsn, [("orders", "inserted")], delivery="outbox", **options)
    relay = relay_source(hub)
    hold_back(monkeypatch, relay.triggers, seen)
    change.make(each_db)
    eventually(lambda: hub.status().reconnects, bool)
    seen.set()
    eventually(lambda: relay.reconnects, bool)
    each_db(f"INSERT INTO {change.into} (id) VALUES (1)")
    broker.acknowledged.wait_until(lambda item: getattr(item, "id", (0,))[0] == 1)


def test_a_stream_whose_hub_has_noticed_first(
    hub: Hub, each_dsn: str, each_db: Database, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser is told of a changed table, too, when the receivers' source saw that first."""
    each_db(f"CREATE TABLE orders {SHAPE}")
    seen = threading.Event()
    hub.on("orders", "inserted")(Recorder())
    hub.start(each_dsn, [("orders", "inserted")], delivery="outbox", heartbeat=0.2)
    feed = open_feed(hub, "orders", size=100, ordered=True)
    assert isinstance(feed, ResumableFeed)
    tab = Tab(feed, Browser())
    hold_back(monkeypatch, feed.tail.source.triggers, seen)
    change.make(each_db)
    eventually(lambda: hub.status().reconnects, bool)
    seen.set()
    number = 0
    # A gap begins at the present, whatever has been written since.
    while not any(kind == "message" for kind, _ in tab.browser.messages):
        number += 1
        each_db(f"INSERT INTO {change.into} (id) VALUES (%s)", (number,))
        tab.browser.receive(tab.more())
