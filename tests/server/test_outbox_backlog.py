"""A consumer that has much to catch up on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import pgsignals
from pgsignals.outbox import log as outbox_log
from pgsignals.sources import durable
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually


def test_a_backlog_does_not_fill_the_memory(
    hub: pgsignals.Hub, dsn: str, db: Database, until_polled: Callable[[], None]
) -> None:
    """Of a large statement, no more is read than is about to be delivered."""
    db("CREATE TABLE items (id bigint PRIMARY KEY)")
    hub.start(dsn, ["items"], delivery="outbox", name="mailer")
    assert hub.stop()
    db("INSERT INTO items SELECT generate_series(1, 400000)")
    going, held = threading.Event(), threading.Event()

    @hub.on("items", "inserted")
    def receive(event: pgsignals.Event) -> None:
        going.set()
        held.wait(DEADLINE)

    hub.start(dsn, ["items"], delivery="outbox", name="mailer", queue_size=1000)
    try:
        assert going.wait(DEADLINE)

        def read() -> tuple[int, int]:
            before = hub.status().unacknowledged
            until_polled()
            return before, hub.status().unacknowledged

        _, now = eventually(read, lambda found: 0 < found[0] == found[1])
        # Ten times the queue, and the page that goes past it.
        assert now < 120_000
    finally:
        held.set()
        hub.stop(0.1)


def test_reading_goes_on_between_acknowledgements(
    hub: pgsignals.Hub, dsn: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What receivers have taken makes room, and not only once that has been written down."""
    db("CREATE TABLE items (id bigint PRIMARY KEY)")
    hub.start(dsn, ["items"], delivery="outbox", name="mailer")
    assert hub.stop()
    db("INSERT INTO items SELECT generate_series(1, 60000)")
    left, done = [60_000], threading.Event()

    @hub.on("items", "inserted")
    def receive(event: pgsignals.Event) -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    monkeypatch.setattr(durable, "ACKNOWLEDGE_SECONDS", 3600.0)
    hub.start(dsn, ["items"], delivery="outbox", name="mailer", queue_size=1000, lease=3600.0)
    assert done.wait(4 * DEADLINE), left


def test_a_page_does_not_look_through_former_ones(
    hub: pgsignals.Hub,
    dsn: str,
    db: Database,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However fast rows come, each is looked at a few dozen times at most."""
    monkeypatch.setattr(outbox_log, "NOTE_SECONDS", 1e9)
    db("CREATE TABLE items (id bigint PRIMARY KEY)")
    hub.on("items", "inserted")(recorder)
    hub.start(dsn, ["items"], delivery="outbox", name="mailer")
    rows = 400
    for number in range(rows):
        db("INSERT INTO items VALUES (%s)", (number,))
        recorder.wait(number + 1)
    assert hub.stop()

    def seen() -> int:
        [(count,)] = db(
            "SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes"
            " WHERE schemaname = 'pgsignals' AND relname LIKE 'outbox%'"
        )
        return int(count)

    # Counts come once the session has gone.
    found = eventually(seen, lambda count: count >= rows)
    assert found < 2 * outbox_log.NOTE_ROWS * rows
