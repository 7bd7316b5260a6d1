"""Two at once: housekeeping beside a consumer that acknowledges, stops, or has been forgotten."""

from __future__ import annotations

from typing import Any

import psycopg2
import pytest

import pgsignals
from pgsignals.consumers.consumer_store import ConsumerStore
from pgsignals.sources.polling import Poller
from tests.conftest import Database, Recorder
from tests.waiting import eventually


@pytest.fixture
def shop(dsn: str, db: Database) -> Database:
    """A database with a table."""
    db("CREATE TABLE items (id bigint PRIMARY KEY)")
    return db


def start(hub: pgsignals.Hub, shop: Database, **options: Any) -> pgsignals.Hub:
    return hub.start(shop.dsn, ["items"], delivery="outbox", **options)


def until(db: Database, statement: str) -> None:
    """Wait until the statement says true."""
    eventually(lambda: db(statement), lambda rows: rows == [(True,)])


def test_events_dropped_while_the_consumer_acknowledges(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """Retention's mark, set while an acknowledgement waits for the row, becomes a Gap."""
    hub.on_gap(recorder)
    start(hub, shop, name="mailer", lease=1.0)
    with psycopg2.connect(shop.dsn) as tidying:
        # As housekeeping does when it drops a partition.
        tidying.cursor().execute("UPDATE pgsignals.consumers SET lost_until = now()")
        until(
            shop,
            "SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted",
        )
    tidying.close()
    [gap] = recorder.wait(1)
    assert gap.reason == "retention"


def test_events_dropped_as_the_consumer_stops(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention's mark that comes with the last acknowledgement is for whoever comes next."""
    start(hub, shop, name="mailer")
    acknowledge = ConsumerStore.acknowledge

    def marked(self: ConsumerStore, *args: Any, **options: Any) -> Any:
        if options.get("release"):
            shop("UPDATE pgsignals.consumers SET lost_until = now()")
        return acknowledge(self, *args, **options)

    monkeypatch.setattr(ConsumerStore, "acknowledge", marked)
    assert hub.stop()
    hub.on_gap(recorder)
    start(hub, shop, name="mailer")
    [gap] = recorder.wait(1)
    assert gap.reason == "retention"


@pytest.mark.parametrize("name", [None, "mailer"])
def test_a_consumer_that_was_forgotten(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, name: str | None
) -> None:
    """A consumer removed while its process was away begins anew, after a Gap: it is never deaf."""
    hub.on("items", "inserted")(lambda event: recorder(event.id))
    hub.on_gap(lambda gap: recorder(gap.reason))
    start(hub, shop, name=name, lease=1.0)
    shop("INSERT INTO items VALUES (1)")
    recorder.wait(1)
    shop("DELETE FROM pgsignals.consumers")
    until(shop, "SELECT count(*) = 1 FROM pgsignals.consumers")
    shop("INSERT INTO items VALUES (2)")
    recorder.wait_until(lambda item: item == 2)
    assert recorder.items[0] == 1
    assert "retention" in recorder.items
    assert recorder.items.index("retention") < recorder.items.index(2)


def test_a_stop_before_what_a_killed_process_left(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever claims and stops before it reads does not make doubtful events new ones."""
    hub.on("items", "inserted")(recorder)
    start(hub, shop, name="mailer")
    [cursor] = shop("SELECT snapshot, floor FROM pgsignals.consumers")
    shop("INSERT INTO items VALUES (1)")
    assert not recorder.wait(1)[0].redelivered
    assert hub.stop()
    # As if it had been killed before it acknowledged.
    shop("UPDATE pgsignals.consumers SET snapshot = %s, floor = %s, clean = false", cursor)
    with monkeypatch.context() as patch:
        patch.setattr(Poller, "read", lambda *_: (False, False))
        start(hub, shop, name="mailer")
        assert hub.stop()
    start(hub, shop, name="mailer")
    assert recorder.wait(2)[1].redelivered


def test_a_claim_right_after_an_acknowledgement(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the former holder did to the last is neither from the future nor new."""
    hub.on("items", "inserted")(lambda event: recorder(event.redelivered))
    gaps = Recorder()
    hub.on_gap(gaps)
    start(hub, shop, name="mailer")
    assert hub.stop()
    claim, before = ConsumerStore.claim, [True]

    def claimed(self: ConsumerStore, *args: Any) -> Any:
        if before:
            # It delivers one, acknowledges it, delivers another, and is killed.
            before.clear()
            shop("INSERT INTO items VALUES (1)")
            shop("UPDATE pgsignals.consumers SET snapshot = pg_current_snapshot()::text")
            shop("INSERT INTO items VALUES (2)")
            shop("UPDATE pgsignals.consumers SET clean = false")
        return claim(self, *args)

    monkeypatch.setattr(ConsumerStore, "claim", claimed)
    start(hub, shop, name="mailer")
    shop("INSERT INTO items VALUES (3)")
    assert recorder.wait(2) == [True, False]
    assert gaps.items == []
