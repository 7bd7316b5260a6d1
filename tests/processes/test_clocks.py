"""The server's clock is set back and forward: nobody waits for that, or is taken for gone."""

from __future__ import annotations

import signal
from datetime import datetime, timedelta, timezone

import pytest

import pgsignals
from pgsignals.consumers.liveness import Stillness
from pgsignals.outbox import housekeeping
from pgsignals.outbox.housekeeping import tidy
from pgsignals.sources.clock import ServerClock
from tests.conftest import Database, Recorder
from tests.consumers import consumers, insert
from tests.forked import Forked
from tests.waiting import eventually

HOLDERS = "SELECT count(DISTINCT holder) FROM pgsignals.consumers WHERE holder <> ''"


def set_clock(db: Database, step: str) -> None:
    """Have the database's clock go wrong by that much from now on."""
    statements = [
        f"CREATE OR REPLACE FUNCTION pg_catalog.{name}() RETURNS timestamptz LANGUAGE sql"
        f" AS $$ SELECT pg_catalog.right_{name}() + '{step}'::interval $$"
        for name in ("now", "clock_timestamp")
    ]
    if db("SELECT to_regproc('pg_catalog.right_now')") == [(None,)]:
        statements = [
            "ALTER FUNCTION pg_catalog.now() RENAME TO right_now",
            "ALTER FUNCTION pg_catalog.clock_timestamp() RENAME TO right_clock_timestamp",
            *statements,
        ]
    # In one transaction: a database without a clock would end the sessions of consumers.
    db(";".join(statements))


@pytest.fixture
def items(each_db: Database) -> Database:
    """A table."""
    each_db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    return each_db


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Gets the server's time whenever the server has told it to a source."""
    made, tell = Recorder(), ServerClock.set

    def noted(self: ServerClock, at_us: int) -> int:
        back = tell(self, at_us)
        made(self.now())
        return back

    monkeypatch.setattr(ServerClock, "set", noted)
    return made


@pytest.mark.parametrize("heartbeat", [0.05, 3600.0])
def test_a_gap_and_a_clock_set_back(
    hub: pgsignals.Hub, items: Database, recorder: Recorder, told: Recorder, heartbeat: float
) -> None:
    """It begins before it ends, and has the time at which the connection was lost, whether a
    heartbeat has told of the change before that or not."""
    hub.on_gap(recorder)
    hub.start(items.dsn, ["items"], heartbeat=heartbeat)
    set_clock(items, "-2 hours")
    if heartbeat < 1:
        late = datetime.now(timezone.utc) - timedelta(hours=1)
        told.wait_until(lambda now: now < late)
    [(lost_at, _), *_] = items(
        "SELECT clock_timestamp(), pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'pgsignals' AND datname = current_database()"
    )
    [gap] = recorder.wait(1)
    assert gap.since <= lost_at <= gap.until
    assert told.items[-1] < datetime.now(timezone.utc) - timedelta(hours=1)


def test_a_gap_of_the_outbox_and_a_clock_set_back(
    hub: pgsignals.Hub, items: Database, recorder: Recorder
) -> None:
    """It begins before it ends."""
    hub.on_gap(recorder)
    hub.start(items.dsn, ["items"], delivery="outbox", name="mailer")
    hub.stop()
    set_clock(items, "-2 hours")
    items("UPDATE pgsignals.consumers SET lost_until = clock_timestamp()")
    hub.start(items.dsn, ["items"], delivery="outbox", name="mailer")
    [gap] = recorder.wait(1)
    assert gap.since < gap.until


def test_a_hung_holder_and_a_clock_set_back(items: Database) -> None:
    """A standby that has seen the holder stand still for the lease takes over."""
    with consumers(items.dsn, items.dsn) as (active, standby):
        assert insert(items) == active.out()
        set_clock(items, "-2 hours")
        active.process.send_signal(signal.SIGSTOP)
        fresh = insert(items)
        while standby.out() != fresh:
            pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_member_that_goes_and_a_clock_set_back(items: Database, number: signal.Signals) -> None:
    """The others have its parts, whether its session has ended or it hangs."""
    with consumers(items.dsn, items.dsn, partitions=2) as (first, second):
        eventually(lambda: items(HOLDERS), lambda found: found == [(2,)])
        set_clock(items, "-2 hours")
        second.process.send_signal(number)
        keys = {insert(items) for _ in range(20)}
        while keys:
            keys.discard(first.out())


def test_a_member_that_is_killed(items: Database) -> None:
    """Its session's end is enough: nobody waits for its lease, which is an hour."""
    with consumers(items.dsn, items.dsn, partitions=2, lease=3600.0) as (first, second):
        eventually(lambda: items(HOLDERS), lambda found: found == [(2,)])
        second.process.kill()
        keys = {insert(items) for _ in range(20)}
        while keys:
            keys.discard(first.out())


def test_a_holder_and_a_clock_set_forward(items: Database) -> None:
    """It keeps its claim, and a standby has nothing to deliver."""
    with consumers(items.dsn, items.dsn) as (active, standby):
        assert insert(items) == active.out()
        claim = "SELECT holder, token FROM pgsignals.consumers"
        held = items(claim)
        set_clock(items, "2 hours")
        # The standby asks more often than a claim is renewed.
        for _ in range(3):
            [(beat,)] = items("SELECT beat FROM pgsignals.consumers")
            eventually(
                lambda: items("SELECT beat FROM pgsignals.consumers"),
                lambda now, beat=beat: now != [(beat,)],
            )
        assert items(claim) == held
        keys = [insert(items) for _ in range(20)]
        assert [active.out() for _ in keys] == keys
        standby.process.terminate()
        assert standby.out() == "ended"


def test_partitions_and_a_clock_set_back(
    hub: pgsignals.Hub, items: Database, recorder: Recorder
) -> None:
    """What all have read is emptied, and the order in which partitions were begun stays."""
    hub.on("items", "inserted")(recorder)
    hub.start(items.dsn, ["items"], delivery="outbox", name="mailer")
    with items.connection.cursor() as cursor:
        for _ in range(2):
            insert(items)
            tidy(cursor, segment_bytes=0)
        recorder.wait(2)
        assert hub.stop()
        order = "SELECT segment FROM pgsignals.segments ORDER BY opened_at"
        before = items(order)
        set_clock(items, "-2 hours")
        tidy(cursor)
        assert items(order) == before
        assert items("SELECT count(*) FROM pgsignals.segments WHERE opened_at > now()") == [(0,)]
        eventually(
            lambda: (tidy(cursor), items("SELECT count(*) FROM pgsignals.outbox"))[1],
            lambda left: left == [(0,)],
        )


def test_what_was_taken_care_of_and_a_clock_set_forward(
    hub: pgsignals.Hub, items: Database
) -> None:
    """While the outbox has an event, ``once`` knows that it was taken care of."""
    hub.start(items.dsn, ["items"], delivery="outbox", name="mailer")
    assert hub.stop()
    insert(items)
    items("INSERT INTO pgsignals.processed VALUES ('mine', 'an event')")
    items("INSERT INTO pgsignals.processed VALUES ('mine', 'of before', '2000-01-01')")
    set_clock(items, "30 days")
    with items.connection.cursor() as cursor:
        tidy(cursor)
    assert items("SELECT uid FROM pgsignals.processed") == [("an event",)]


NAMELESS = """
import os, pgsignals
with pgsignals.start(os.environ["PGSIGNALS_DSN"], ["items"], delivery="outbox", lease=1.0) as hub:
    print("started", flush=True)
    hub.run()
"""


def test_a_process_without_a_name(items: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is forgotten some time after its end, however the clock is set, and not before."""
    monkeypatch.setattr(housekeeping, "FORGET_SECONDS", 0.0)
    known = "SELECT count(*) FROM pgsignals.consumers"
    still: Stillness[tuple[str, int]] = Stillness()
    program = Forked("-c", NAMELESS, dsn=items.dsn)
    try:
        assert program.out() == "started"
        set_clock(items, "2 hours")
        beats = [items("SELECT beat FROM pgsignals.consumers")]
        with items.connection.cursor() as cursor:
            # It lives longer than its lease.
            while len(beats) < 6:
                tidy(cursor, still=still)
                if (beat := items("SELECT beat FROM pgsignals.consumers")) != beats[-1]:
                    beats.append(beat)
            assert items(known) == [(1,)]
            program.process.kill()
            set_clock(items, "-2 hours")
            eventually(
                lambda: (tidy(cursor, still=still), items(known))[1], lambda left: left == [(0,)]
            )
    finally:
        program.process.kill()
        program.process.wait()


def test_members_that_have_gone(items: Database) -> None:
    """Their rows go with their sessions."""
    with consumers(items.dsn, items.dsn, partitions=2, lease=3600.0) as (_, second):
        members = "SELECT count(*) FROM pgsignals.members"
        eventually(lambda: items(members), lambda found: found == [(2,)])
        second.process.kill()
        with items.connection.cursor() as cursor:
            eventually(lambda: (tidy(cursor), items(members))[1], lambda found: found == [(1,)])
