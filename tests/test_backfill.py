"""Backfills: rows that exist come as snapshots, in order among the other events."""

from __future__ import annotations

import pytest

import pgsignals
from pgsignals import Hub
from tests.conftest import Database, Recorder


@pytest.fixture(autouse=True)
def users(db: Database) -> None:
    """A table of 500 users."""
    db("CREATE TABLE users (id bigint PRIMARY KEY, name text)")
    db("INSERT INTO users SELECT n, 'user ' || n FROM generate_series(1, 500) AS n")


def test_rows_come_in_the_order_of_their_keys(
    dsn: str, hub: Hub, recorder: Recorder
) -> None:
    """Each row is an event once, with what an update carries, and then the backfill is done."""
    hub.on("users", "snapshot")(recorder)
    hub.start(dsn, [pgsignals.watch("users", extra=["name"])], delivery="outbox", name="mailer")
    backfill = hub.backfill("users", chunk=70)
    assert backfill.wait(15)
    assert (backfill.state, backfill.done, backfill.total) == ("done", 500, 500)
    events = recorder.wait(500)
    assert [event.id for event in events] == list(range(1, 501))
    first = events[0]
    assert (first.op, first.key, first.values) == ("snapshot", {"id": 1}, {"name": "user 1"})
    assert (first.old, first.changed, dict(first.context)) == ({}, frozenset(), {})
    assert len({event.uid for event in events}) == 500
    assert not any(event.redelivered for event in events)
