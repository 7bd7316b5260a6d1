"""Backfills by several processes, of which some are killed: all rows come, and the newest last."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pgsignals import Backfill, Hub
from tests.backfills import ask, rows
from tests.backfills import users as users
from tests.commands import Program
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually

CONSUME = """
import os, sys
import pgsignals

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

@pgsignals.on("users")
def receive(event):
    say(event.op, event.id, event.values["name"], event.redelivered, event.uid)

pgsignals.start(os.environ["PGSIGNALS_DSN"], [pgsignals.watch("users", extra=["name"])],
                delivery="outbox", name="mailer", partitions=int(sys.argv[1]), lease=2.0,
                queue_size=50)
say("started")
pgsignals.run()
say("ended")
"""


@dataclass(frozen=True)
class Said:
    """What a consumer's process said of an event."""

    op: str
    id: int
    name: str
    redelivered: bool
    uid: str


class Consumer(Program):
    """A process of the consumer, which is listened to in the background."""

    def __init__(self, dsn: str, partitions: int = 1) -> None:
        super().__init__("-c", CONSUME, str(partitions), dsn=dsn)
        assert self.out() == "started"
        self.heard: list[Said] = []
        self.first_heard_at = math.inf
        self.enough = threading.Condition()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        while (line := self._out.next_or_end()) not in (None, "ended"):
            assert line is not None
            op, key, rest = line.split(" ", 2)
            name, redelivered, uid = rest.rsplit(" ", 2)
            with self.enough:
                self.first_heard_at = min(self.first_heard_at, time.monotonic())
                self.heard.append(Said(op, int(key), name, redelivered == "True", uid))
                self.enough.notify_all()

    def wait_for(self, count: int) -> None:
        """Until so many events have come."""
        with self.enough:
            assert self.enough.wait_for(lambda: len(self.heard) >= count, DEADLINE)

    def kill(self) -> None:
        """``kill -9``."""
        self.process.kill()
        self.process.wait()
        self._listener.join()


def active(db: Database, found: Sequence[Consumer]) -> Consumer:
    """The one of them that reads."""
    alive = {str(each.process.pid): each for each in found if each.process.returncode is None}
    deadline = time.monotonic() + DEADLINE
    while True:
        [(holder,)] = db("SELECT coalesce(holder, '::') FROM pgsignals.consumers")
        if (reading := alive.get(holder.split(":")[1])) is not None:
            return reading
        assert time.monotonic() < deadline, holder


def test_another_process_goes_on_after_a_kill(dsn: str, db: Database) -> None:
    """It resumes where that had acknowledged: no row is missed, and few come twice."""
    rows(db, 30_000, 501)
    first = Consumer(dsn)
    second = Consumer(dsn)
    try:
        backfill = Backfill(dsn, ask(db, "mailer", "users"))
        acknowledged = eventually(
            lambda: db("SELECT delivered FROM pgsignals.backfill_parts")[0][0],
            lambda delivered: delivered >= 2_000,
        )
        db("UPDATE users SET name = 'new ' || id WHERE id % 1000 = 0")
        first.kill()
        assert backfill.wait(60)
        db("INSERT INTO users VALUES (99999, 'the end')")
        second.wait_for(1)
        while second.heard[-1].id != 99_999:
            second.wait_for(len(second.heard) + 1)
    finally:
        first.kill()
        second.kill()
    snapshots = [s for each in (first, second) for s in each.heard if s.op == "snapshot"]
    assert {s.id for s in snapshots} == set(range(1, 30_501))
    # One uid a row, whoever reads it; what came twice says so.
    assert len({s.uid for s in snapshots}) == 30_500
    again = {s.uid for s in first.heard} & {s.uid for s in second.heard}
    assert all(s.redelivered for s in second.heard if s.uid in again)
    assert len([s for s in second.heard if s.op == "snapshot"]) <= 30_500 - acknowledged
    latest = {s.id: s.name for each in (first, second) for s in each.heard}
    assert latest == dict(db("SELECT id, name FROM users"))


def test_kills_beside_writers(dsn: str, db: Database, connect: Callable[[str], Database]) -> None:
    """Through several kills, no row is missed, and each record's last event is its newest state."""
    rows(db, 40_000, 501)
    ending = threading.Event()
    untouched = {key for (key,) in db("SELECT id FROM users")}

    def write(seed: int) -> None:
        chance, own, number = random.Random(seed), connect(dsn), 0
        while not ending.is_set():
            number += 1
            # Records of its own, so that writers do not deadlock.
            key = 2 * chance.randint(1, 20_200) + seed
            untouched.discard(key)
            own(
                chance.choice(
                    [
                        "UPDATE users SET name = %(text)s WHERE id = %(key)s",
                        "INSERT INTO users VALUES (%(key)s, %(text)s)"
                        " ON CONFLICT (id) DO UPDATE SET name = excluded.name",
                        "DELETE FROM users WHERE id = %(key)s",
                    ]
                ),
                {"key": key, "text": f"{seed}-{number}"},
            )

    chance = random.Random(7)
    found = [Consumer(dsn), Consumer(dsn)]
    backfill = Backfill(dsn, ask(db, "mailer", "users"))
    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    for each in writers:
        each.start()
    try:
        for _ in range(4):
            reading = active(db, found)
            reading.wait_for(chance.randint(1, 6_000))
            reading.kill()
            found.append(Consumer(dsn))
        assert backfill.wait(60)
        ending.set()
        for each in writers:
            each.join()
        db("INSERT INTO users VALUES (99999, 'the-end')")
        last = active(db, found)
        last.wait_for(1)
        while last.heard[-1].id != 99_999:
            last.wait_for(len(last.heard) + 1)
    finally:
        ending.set()
        for each in found:
            each.kill()
    latest: dict[int, str] = {}
    # Each was active once, but whoever came later may have been sooner.
    found.sort(key=lambda each: each.first_heard_at)
    heard = [said for each in found for said in each.heard]
    for said in heard:
        if said.op == "deleted":
            latest.pop(said.id, None)
        else:
            latest[said.id] = said.name
    assert latest == dict(db("SELECT id, name FROM users"))
    assert len(untouched) > 1_000
    assert untouched <= {said.id for said in heard if said.op == "snapshot"}


def test_processes_share_a_backfill(dsn: str, db: Database) -> None:
    """Each delivers the rows of its parts, every row once, in order."""
    rows(db, 2_000, 501)
    one, two = Consumer(dsn, 2), Consumer(dsn, 2)
    try:
        deadline = time.monotonic() + DEADLINE
        while db("SELECT count(DISTINCT holder) FROM pgsignals.consumers") != [(2,)]:
            assert time.monotonic() < deadline
        backfill = Backfill(dsn, ask(db, "mailer", "users"))
        assert backfill.wait(DEADLINE)
        one.wait_for(1)
        two.wait_for(1)
        with one.enough, two.enough:
            heard = [[s.id for s in each.heard] for each in (one, two)]
        assert all(len(each) > 800 and each == sorted(each) for each in heard)
        assert sorted(heard[0] + heard[1]) == list(range(1, 2_501))
        assert (backfill.done, backfill.total, backfill.status.delivered) == (2500, 2500, 2500)
    finally:
        one.kill()
        two.kill()


def test_a_backfill_that_was_asked_for_while_nobody_was_there(
    dsn: str, db: Database, hub: Hub, recorder: Recorder
) -> None:
    """It begins with the consumer's next process."""
    hub.on("users", "snapshot")(recorder)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    hub.stop()
    backfill = Backfill(dsn, ask(db, "mailer", "users"))
    assert not backfill.wait(0)
    hub.start(dsn, ["users"], delivery="outbox", name="mailer")
    assert backfill.wait(DEADLINE)
    assert len(recorder.items) == 500
