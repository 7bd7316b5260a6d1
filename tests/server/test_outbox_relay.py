"""Outbox delivery to a broadcaster, whose cursor moves once events are acknowledged."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

import pgsignals
from tests.broadcasters import Broker
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually


@pytest.fixture
def shop(db: Database) -> Database:
    """A database with a table."""
    db("CREATE TABLE items (id bigint PRIMARY KEY)")
    return db


def test_a_broker_that_is_away(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """While a broker is away, receivers go on; once it is back, it gets everything, in order."""
    broker = Broker()
    broker.away.set()
    hub.on("items")(recorder)
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", backends=[broker])
    shop("INSERT INTO items SELECT generate_series(1, 1000)")
    assert len(recorder.wait(1000)) == 1000
    assert broker.refused.wait(DEADLINE)
    [backend] = eventually(lambda: hub.status().backends, lambda found: found[0].depth == 1000)
    assert not backend.ready
    assert backend.active
    assert 0 < backend.lag < 15
    broker.away.clear()
    assert [event.id for event in broker.acknowledged.wait(1000)] == list(range(1, 1001))


def test_it_goes_on_where_the_broker_was(hub: pgsignals.Hub, shop: Database) -> None:
    """What the broker had not acknowledged at stop() goes there after the next start."""
    broker = Broker()
    broker.away.set()
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", backends=[broker])
    shop("INSERT INTO items VALUES (1)")
    assert broker.refused.wait(DEADLINE)
    assert not hub.stop(0.5)
    names = shop("SELECT name, acknowledged FROM pgsignals.consumers ORDER BY name")
    assert names == [("mailer", 1), ("mailer/broker", 0)]
    back = Broker()
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", backends=[back])
    [event] = back.acknowledged.wait(1)
    assert event.id == 1
    assert event.redelivered


def test_a_broker_that_is_away_shows_before_there_are_events(
    hub: pgsignals.Hub, shop: Database
) -> None:
    """It is tried at once, and again until it is there."""
    broker = Broker()
    broker.away.set()
    hub.start(shop.dsn, ["items"], delivery="outbox", backends=[broker])
    eventually(lambda: hub.health().backends, lambda found: found[0].failures > 1)
    broker.away.clear()
    eventually(lambda: hub.health().backends, lambda found: found[0].ready)


def test_a_relay_alone_keeps_no_cursor_for_receivers(hub: pgsignals.Hub, shop: Database) -> None:
    """With workers=0 there are the consumers of the backends, by their names, and no other."""
    first, second = Broker(), Broker()
    hub.start(
        shop.dsn,
        ["items"],
        delivery="outbox",
        name="shop",
        backends={"first": first, "second": second},
        workers=0,
    )
    shop("INSERT INTO items VALUES (1)")
    for broker in (first, second):
        assert [event.id for event in broker.acknowledged.wait(1)] == [1]
    health = hub.health()
    assert (health.ready, [each.active for each in health.backends]) == (True, [True, True])
    with pytest.raises(pgsignals.ReceiverError):
        hub.on("items")(first.acknowledged)
    assert hub.stop()
    names = shop("SELECT name, acknowledged FROM pgsignals.consumers ORDER BY name")
    assert names == [("shop/first", 1), ("shop/second", 1)]


def test_a_relay_alone_has_no_receivers(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """With workers=0 a receiver, which nobody would call, is an error."""
    hub.on("items")(recorder)
    with pytest.raises(pgsignals.ReceiverError, match="workers=0 only passes events on"):
        hub.start(shop.dsn, ["items"], delivery="outbox", backends=[Broker()], workers=0)


def test_a_backend_keeps_its_cursor_by_its_name(hub: pgsignals.Hub, shop: Database) -> None:
    """One that is taken away leaves the places of the others as they were."""
    gone, kept = Broker(), Broker()
    kept.away.set()
    start = {"delivery": "outbox", "name": "shop", "workers": 0}
    hub.start(shop.dsn, ["items"], backends={"gone": gone, "kept": kept}, **start)
    shop("INSERT INTO items VALUES (1)")
    gone.acknowledged.wait(1)
    assert kept.refused.wait(DEADLINE)
    assert not hub.stop(0.1)
    back = Broker()
    hub.start(shop.dsn, ["items"], backends={"kept": back}, **start)
    assert [event.id for event in back.acknowledged.wait(1)] == [1]


def test_a_wrong_name_of_a_backend(hub: pgsignals.Hub, shop: Database) -> None:
    """It is refused, with what is allowed."""
    with pytest.raises(pgsignals.ConfigurationError, match=r"name 'a/b'.*letters, digits"):
        hub.start(shop.dsn, ["items"], delivery="outbox", backends={"a/b": Broker()})


def test_a_backfill_for_the_broker(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """By the broker's consumer, rows go to the broker alone, and wait for it while it is away."""
    shop("INSERT INTO items SELECT generate_series(1, 1000)")
    broker = Broker()
    broker.away.set()
    hub.on("items")(recorder)
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", backends=[broker])
    backfill = hub.backfill("items", name="mailer/broker", chunk=100)
    assert broker.refused.wait(DEADLINE)
    assert backfill.done == 0
    broker.away.clear()
    assert backfill.wait(DEADLINE)
    events = broker.acknowledged.wait(1000)
    assert [(event.op, event.id) for event in events] == [
        ("snapshot", number) for number in range(1, 1001)
    ]
    assert not recorder.items
    assert hub.backfill("items", where="id = 7").wait(DEADLINE)
    assert [event.id for event in recorder.items] == [7]
    assert len(broker.acknowledged.items) == 1000


def test_a_table_that_went_before_a_relay_came_back(hub: pgsignals.Hub, shop: Database) -> None:
    """What was committed before is passed on, also by a process without receivers."""
    start = {"delivery": "outbox", "name": "shop", "workers": 0}
    away = Broker()
    away.away.set()
    hub.start(shop.dsn, ["items"], backends={"main": away}, **start)
    shop("INSERT INTO items VALUES (1), (2)")
    assert away.refused.wait(DEADLINE)
    hub.stop(0.1)
    shop("DROP TABLE items")
    back = Broker()
    hub.start(shop.dsn, ["items"], backends={"main": back}, **start)
    assert [event.id for event in back.acknowledged.wait(2)] == [1, 2]


def test_backfill_of_a_relay(hub: pgsignals.Hub, shop: Database) -> None:
    """A process without receivers sends the rows that are there to the backend that is named."""
    shop("INSERT INTO items SELECT generate_series(1, 50)")
    first, second = Broker(), Broker()
    backends = {"first": first, "second": second}
    hub.start(shop.dsn, ["items"], delivery="outbox", name="shop", backends=backends, workers=0)
    with pytest.raises(pgsignals.ConfigurationError, match="'shop/first', 'shop/second'"):
        hub.backfill("items")
    assert hub.backfill("items", name="shop/second").wait(DEADLINE)
    events = second.acknowledged.wait(50)
    assert [(event.op, event.id) for event in events] == [("snapshot", n) for n in range(1, 51)]
    assert first.acknowledged.items == []


def test_at_the_end_no_backend_reads_on(hub: pgsignals.Hub, shop: Database) -> None:
    """While one that is away is waited for, the others drain, and take nothing new."""
    away, there = Broker(), Broker()
    away.away.set()
    backends = {"away": away, "there": there}
    hub.start(shop.dsn, ["items"], delivery="outbox", name="shop", backends=backends, workers=0)
    shop("INSERT INTO items VALUES (0)")
    assert away.refused.wait(DEADLINE)
    there.acknowledged.wait(1)
    stopping = threading.Thread(target=hub.stop, args=(3.0,))
    stopping.start()
    began, late = time.monotonic(), []
    for number in itertools.count(1):
        if not stopping.is_alive():
            break
        if time.monotonic() - began > 1.5:
            late.append(number)
        shop("INSERT INTO items VALUES (%s)", (number,))
        stopping.join(0.05)
    assert late
    assert not {event.id for event in there.acknowledged.items} & set(late)


def test_what_another_process_sends_is_given_up(hub: pgsignals.Hub, shop: Database) -> None:
    """Once another has its claim, a relay has its broadcaster forget what is not acknowledged."""
    broker, other = Broker(), Broker()
    broker.away.set()
    first = f"{shop.dsn}?application_name=first"
    hub.start(first, ["items"], delivery="outbox", name="mailer", backends=[broker])
    shop("INSERT INTO items VALUES (1)")
    assert broker.refused.wait(DEADLINE)
    second = pgsignals.Hub()
    second.start(shop.dsn, ["items"], delivery="outbox", name="mailer", backends=[other])
    try:

        def taken_over() -> bool:
            # The first may be back before the second has noticed.
            shop(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'first'"
            )
            return second.status().backends[0].active

        eventually(taken_over, bool)
        assert [event.id for event in other.acknowledged.wait(1)] == [1]
        assert broker.closed.wait(DEADLINE)
    finally:
        second.stop()
