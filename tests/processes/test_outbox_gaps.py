"""What was lost is announced until somebody has been told, whatever becomes of the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import pgsignals
from tests.broadcasters import Broker
from tests.conftest import DEADLINE, Database, Recorder
from tests.forked import Forked
from tests.waiting import eventually

CONSUME = """
import os, signal, sys
import pgsignals

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

@pgsignals.on("items", "inserted")
def receive(event):
    say(event.id)

@pgsignals.on_gap
def resync(gap):
    say(gap.reason)
    if sys.argv[1] == "hangs":
        signal.pause()

pgsignals.start(os.environ["PGSIGNALS_DSN"], ["items"], delivery="outbox", name="mailer",
                lease=1.0)
say("started")
pgsignals.run()
"""

LOSSES = {
    # As housekeeping marks it.
    "dropped": ("UPDATE pgsignals.consumers SET lost_until = clock_timestamp()", "retention"),
    # As a writer does who finds the outbox full.
    "shed": ("SELECT nextval('pgsignals.outbox_shed')", "retention"),
    "another cluster": ("UPDATE pgsignals.consumers SET epoch = '1/1'", "restored"),
    "promoted": (
        "UPDATE pgsignals.consumers SET epoch = split_part(epoch, '/', 1) || '/99'",
        "restored",
    ),
    "gone back in time": (
        "UPDATE pgsignals.consumers SET snapshot = '99999999:99999999:'",
        "restored",
    ),
}
UNTOLD = """
SELECT lost_until IS NOT NULL OR epoch <> %s OR snapshot = '99999999:99999999:'
  OR shed <> (SELECT last_value FROM pgsignals.outbox_shed)
FROM pgsignals.consumers
"""


@pytest.fixture
def shop(db: Database) -> Database:
    """A database with a table."""
    db("CREATE TABLE items (id bigint PRIMARY KEY, name text)")
    return db


def until_heard(program: Forked, line: str) -> list[str]:
    """What it says up to that line."""
    heard = [program.out()]
    while heard[-1] != line:
        heard.append(program.out())
    return heard


def until_renewed(shop: Database) -> None:
    """Wait until the claim has been renewed."""
    renewals = "SELECT beat FROM pgsignals.consumers"
    before = shop(renewals)
    eventually(lambda: shop(renewals), lambda now: now != before)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_process_killed_in_a_gap_receiver(hub: pgsignals.Hub, shop: Database, loss: str) -> None:
    """The Gap comes again until its receivers have returned, and then no more."""
    statement, reason = LOSSES[loss]
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer")
    assert hub.stop()
    [(epoch,)] = shop("SELECT epoch FROM pgsignals.consumers")
    shop(statement)
    for manner in ("hangs", "hangs", "returns"):
        program = Forked("-c", CONSUME, manner, dsn=shop.dsn)
        try:
            until_heard(program, reason)
            if manner == "hangs":
                # It has renewed its claim meanwhile, and acknowledged nothing.
                until_renewed(shop)
                assert shop(UNTOLD, (epoch,)) == [(True,)]
            else:
                eventually(lambda: shop(UNTOLD, (epoch,)), lambda now: now == [(False,)])
        finally:
            program.process.kill()
            program.process.wait()
    shop("INSERT INTO items VALUES (1)")
    program = Forked("-c", CONSUME, "returns", dsn=shop.dsn)
    try:
        assert reason not in until_heard(program, "1")
    finally:
        program.process.kill()
        program.process.wait()


def test_a_process_killed_while_it_is_told_of_a_broken_watcher(
    hub: pgsignals.Hub, shop: Database
) -> None:
    """A row that says that its watcher is broken is acknowledged once receivers know it."""
    watcher = pgsignals.watch("items", "inserted", extra=["name"])
    hub.start(shop.dsn, [watcher], delivery="outbox", name="mailer")
    assert hub.stop()
    shop("ALTER TABLE items RENAME COLUMN name TO title")
    shop("INSERT INTO items VALUES (1)")
    for manner in ("hangs", "returns"):
        program = Forked("-c", CONSUME, manner, dsn=shop.dsn)
        try:
            until_heard(program, "watcher_broken")
            until_renewed(shop)
        finally:
            program.process.kill()
            program.process.wait()


def test_a_consumer_that_was_removed(hub: pgsignals.Hub, shop: Database) -> None:
    """Whoever takes over from a process whose consumer had been removed announces it too."""
    called, held = threading.Event(), threading.Event()

    @hub.on_gap
    def receive(gap: pgsignals.Gap) -> None:
        called.set()
        held.wait()

    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", lease=1.0)
    shop("DELETE FROM pgsignals.consumers")
    assert called.wait(DEADLINE)
    other, gaps = pgsignals.Hub(), Recorder()
    other.on_gap(gaps)
    try:
        assert not hub.stop(0.2)
        with other.start(shop.dsn, ["items"], delivery="outbox", name="mailer"):
            [gap] = gaps.wait(1)
    finally:
        held.set()
    assert gap.reason == "retention"
    assert gap.since < gap.until


def test_a_broker_that_is_away_when_something_is_lost(hub: pgsignals.Hub, shop: Database) -> None:
    """A broker is told again until it has acknowledged, and then no more."""
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", backends=[Broker()])
    assert hub.stop()
    shop("UPDATE pgsignals.consumers SET lost_until = now() WHERE name = 'mailer/broker'")
    away = Broker()
    away.away.set()
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", backends=[away])
    # It has been told, and does not acknowledge.
    assert away.refused.wait(DEADLINE)
    assert not hub.stop(0.5)
    back = Broker()
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", backends=[back])
    [gap] = back.acknowledged.wait(1)
    assert gap.reason == "retention"
    assert hub.stop()
    shop("INSERT INTO items VALUES (1)")
    again = Broker()
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", backends=[again])
    [event] = again.acknowledged.wait(1)
    assert event.id == 1


def test_when_something_was_lost(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> None:
    """A Gap begins where all had been acknowledged, however late the loss is noticed."""
    hub.on_gap(recorder)
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", lease=1.0)
    acknowledged_at = "SELECT acknowledged_at FROM pgsignals.consumers"
    [(before,)] = shop(acknowledged_at)
    eventually(lambda: shop(acknowledged_at), lambda now: now != [(before,)])
    [(marked,)] = shop(
        "UPDATE pgsignals.consumers SET lost_until = clock_timestamp() RETURNING lost_until"
    )
    [gap] = recorder.wait(1)
    assert gap.until == marked
    assert gap.since < marked


@pytest.fixture
def doubting(hub: pgsignals.Hub, shop: Database, recorder: Recorder) -> Iterator[Database]:
    """A transaction for whose end the Hub waits, to announce once more what it has announced."""
    hub.on_gap(recorder)
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer").stop()
    # As a process leaves it that has seen something missing, and died.
    shop("UPDATE pgsignals.consumers SET installation = ''")
    long = Database(shop.dsn)
    long("BEGIN")
    # Before it has ended, what it could not write is not missing.
    long("SELECT pg_current_xact_id()")
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", lease=1.0, heartbeat=0.2)
    recorder.wait(1)
    lost = "SELECT count(lost_until) FROM pgsignals.consumers"
    eventually(lambda: shop(lost), lambda found: found == [(0,)])
    yield long
    long.connection.close()


def test_a_loss_that_is_known_is_announced_at_once(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """However long the lease is that is renewed from time to time, no Gap waits for that."""
    hub.on_gap(recorder)
    options: dict[str, Any] = {"name": "mailer", "heartbeat": 0.05, "lease": 3600.0}
    hub.start(shop.dsn, ["items"], delivery="outbox", **options)
    shop("ALTER TABLE items DISABLE TRIGGER USER; ALTER TABLE items ENABLE TRIGGER USER")
    [gap] = recorder.wait(1)
    assert gap.since < gap.until


def test_both_gaps_of_a_loss_begin_at_one_time(
    shop: Database, recorder: Recorder, doubting: Database
) -> None:
    """What another process has kept of the triggers since does not move the second Gap."""
    [first] = recorder.wait(1)
    shop("UPDATE pgsignals.consumers SET verified_at = clock_timestamp()")
    doubting("COMMIT")
    [_, second] = recorder.wait(2)
    assert second.since <= first.until
    assert second.until > first.until


def test_a_loss_is_for_whoever_reads_to_announce(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder, doubting: Database
) -> None:
    """A process that gets its part back from another one does not announce again what that has."""
    # The other one has announced it all, and kept the triggers; then it dies.
    with pgsignals.Hub().start(shop.dsn, ["items"], delivery="outbox", name="other"):
        [(kept,)] = shop("SELECT installation FROM pgsignals.consumers WHERE name = 'other'")
    shop("DELETE FROM pgsignals.consumers WHERE name = 'other'")
    shop(
        "UPDATE pgsignals.consumers SET holder = 'another', token = token + 1, installation = %s,"
        " verified_at = clock_timestamp() WHERE name = 'mailer' RETURNING token",
        (kept,),
    )
    holder = "SELECT holder <> 'another' FROM pgsignals.consumers WHERE name = 'mailer'"
    eventually(lambda: shop(holder), lambda ours: ours == [(True,)])
    doubting("COMMIT")
    # It polls, looks at the triggers, and acknowledges.
    kept_at = "SELECT verified_at FROM pgsignals.consumers WHERE name = 'mailer'"
    [(before,)] = shop("SELECT clock_timestamp()")
    eventually(lambda: shop(kept_at), lambda found: found[0][0] > before)
    until_renewed(shop)
    assert hub.stop()
    assert len(recorder.items) == 1


def statements(recorder: Recorder) -> pgsignals.Gap:
    """The Gap of what writers left out."""
    *_, gap = recorder.wait_until(lambda gap: "statements could not write" in gap.detail)
    return gap


def test_what_is_left_out_while_a_loss_is_announced(
    shop: Database, recorder: Recorder, doubting: Database
) -> None:
    """It is announced as of when it was, though all else has been acknowledged since."""
    [(left_out, _)] = shop("SELECT clock_timestamp(), nextval('pgsignals.outbox_shed')")
    acknowledged = "SELECT acknowledged_at FROM pgsignals.consumers"
    eventually(lambda: shop(acknowledged), lambda found: found[0][0] > left_out)
    doubting("COMMIT")
    assert statements(recorder).since <= left_out


def test_what_was_left_out_when_a_process_died(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """Whoever takes over announces it as of when the triggers were right, not of the last word."""
    hub.on_gap(recorder)
    hub.start(shop.dsn, ["items"], delivery="outbox", name="mailer", lease=1.0)
    # As another process leaves the part that has seen something missing, acknowledged on, and died.
    [(right_at,)] = shop(
        "UPDATE pgsignals.consumers SET holder = '-', token = token + 1, installation = '',"
        " shed = shed - 1, acknowledged_at = clock_timestamp() RETURNING verified_at"
    )
    assert statements(recorder).since <= right_at


def test_what_was_left_out_is_new_to_a_part_that_comes_later(
    hub: pgsignals.Hub, shop: Database, recorder: Recorder
) -> None:
    """Its Gap is its own: the parts that have been told of it get no other one."""
    hub.on_gap(recorder)
    hub.start(
        shop.dsn,
        ["items"],
        delivery="outbox",
        name="mailer",
        partitions=2,
        lease=1.0,
        heartbeat=0.1,
    )
    shop("SELECT nextval('pgsignals.outbox_shed')")
    told = (
        "SELECT count(*) FROM pgsignals.consumers, pgsignals.outbox_shed AS s"
        " WHERE shed = last_value AND lost_until IS NULL AND installation <> '' AND holder <> '-'"
    )
    recorder.wait(2)
    eventually(lambda: shop(told), lambda found: found == [(2,)])
    before = len(recorder.items)
    # As of a part that another process has had, which died before it was told.
    shop(
        "UPDATE pgsignals.consumers SET holder = '-', token = token + 1, shed = shed - 1"
        " WHERE part = 1"
    )
    recorder.wait(before + 1)
    eventually(lambda: shop(told), lambda found: found == [(2,)])
    kept_at = "SELECT min(verified_at) FROM pgsignals.consumers"
    [(now,)] = shop("SELECT clock_timestamp()")
    eventually(lambda: shop(kept_at), lambda found: found[0][0] > now)
    assert hub.stop()
    [gap] = recorder.items[before:]
    assert "1 statements" in gap.detail
