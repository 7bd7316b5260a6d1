"""Who listens to what, as others see it: by few locks, and never a trigger too few."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress

import psycopg2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import cursor as Cursor

import pgsignals
from pgsignals import Hub
from pgsignals.triggers import names
from pgsignals.triggers.catalogue import read_listeners
from pgsignals.triggers.installer import uninstall
from tests.conftest import Database, Recorder
from tests.waiting import eventually

hashes = st.integers(0, 2**64 - 1).map("{:016x}".format)


@given(st.lists(hashes, max_size=700))
def test_no_trigger_is_left_out(heard: list[str]) -> None:
    """Whatever is listened to is seen, by keys that fit a lock, signed or not, and are few."""
    keys = names.listener_keys(heard)
    assert len(keys) <= names.LISTENER_LOCKS
    assert all(-(2**31) <= key < 2**31 for key in keys)
    for seen in (keys, [key % 2**32 for key in keys]):
        assert all(names.listens(seen, each) for each in heard)


@pytest.mark.parametrize(("watched", "share"), [(0, 0.0), (30, 0.01), (100, 0.08), (300, 0.35)])
def test_few_others_are_taken_for_heard(watched: int, share: float) -> None:
    """Of triggers that nobody listens to, few seem to be heard, even beside hundreds that are."""
    keys = names.listener_keys(names.digest("heard", str(each)) for each in range(watched))
    others = [names.digest("other", str(each)) for each in range(5000)]
    assert sum(names.listens(keys, each) for each in others) <= share * len(others)


@pytest.fixture
def session(each_dsn: str) -> Iterator[Cursor]:
    """A cursor in autocommit mode."""
    with closing(psycopg2.connect(each_dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor


def test_a_busy_namespace_does_not_keep_another(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    recorder: Recorder,
    session: Cursor,
) -> None:
    """Beside a Hub that listens to many triggers, most others can be removed, and none of its.

    Which ones are taken for heard depends on hashes alone.
    """
    tables = [f"t{number}" for number in range(50)]
    for table in tables:
        each_db(f"CREATE TABLE {table} (id int PRIMARY KEY)")
    hub.subscribe(recorder, "t49")
    watchers = [(table, "inserted", "deleted") for table in tables]
    hub.start(each_dsn, watchers, namespace="busy")
    idle = [f"idle_{number}" for number in range(6)]
    for namespace in idle:
        Hub().start(each_dsn, [("t0", "inserted")], namespace=namespace).stop()
    # The sessions of those that were stopped end a little later.
    eventually(lambda: read_listeners(session), lambda found: len(found) == 1)
    removed = 0
    for namespace in idle:
        with suppress(pgsignals.DatabaseError):
            removed += len(uninstall(session, namespace))
    assert removed >= 3
    with pytest.raises(pgsignals.DatabaseError, match="A listener needs"):
        uninstall(session, "busy")
    each_db("INSERT INTO t49 VALUES (1)")
    assert recorder.wait(1)[0].id == 1
