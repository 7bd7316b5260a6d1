"""Outbox delivery, several workers: a receiver that hangs holds up nobody, and loses nothing."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

import pgsignals
from pgsignals.consumers.dead_letters import retry
from pgsignals.dispatch import held_events
from pgsignals.dispatch.held_events import Held, Ledger
from pgsignals.dispatch.in_flight import Lease, Page
from pgsignals.dispatch.registry import Registry, Subscription, receiver_name
from pgsignals.outbox.housekeeping import tidy
from pgsignals.testing.conformance import make_event
from tests.commands import Program
from tests.conftest import DEADLINE, Database, Recorder
from tests.hanging import (
    QUEUE_SIZE,
    Next,
    hanging,
    in_order,
    parked,
    start,
    until_none_parked,
    until_parked,
    write,
)
from tests.hanging import again as again
from tests.hanging import gate as gate
from tests.hanging import others as others
from tests.hanging import park as park
from tests.hanging import shop as shop
from tests.inside import run
from tests.waiting import eventually

# Past the queue of a receiver that hangs.
MANY = 4 * QUEUE_SIZE


def test_the_others_go_on(
    hub: pgsignals.Hub,
    shop: Database,
    gate: threading.Event,
    others: Recorder,
    recorder: Recorder,
    park: Callable[..., None],
) -> None:
    """Past the queue's size, too: the cursor moves, and what the one has not taken is kept."""
    park(recorder)
    others.wait(90)
    status = hub.status()
    assert status.outbox is not None
    [state] = status.outbox.parked
    assert (state.consumer, state.events) == ("mailer", 90)
    assert status.aside == (state.receiver,)
    assert state.receiver.endswith("hangs")
    assert status.unacknowledged == 0
    health = hub.health()
    assert (health.ready, health.aside) == (True, status.aside)
    # Nobody else's rows are kept with an event.
    assert shop(
        "SELECT DISTINCT array_length(string_to_array(payload, E'\\n'), 1) FROM pgsignals.parked"
    ) == [(2,)]
    gate.set()
    recorder.wait(90)
    until_none_parked(shop)
    write(shop, 1, first=8)
    recorder.wait(100)
    others.wait(100)
    assert in_order(recorder)
    assert len(recorder.items) == len(set(recorder.items)) == 100


def test_it_is_kept_when_it_is_old(
    hub: pgsignals.Hub,
    shop: Database,
    gate: threading.Event,
    others: Recorder,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A receiver that hangs with few events does not keep the cursor either."""
    monkeypatch.setattr(held_events, "PATIENCE_SECONDS", 0.1)
    hanging(hub, gate, others, recorder)
    start(hub, shop)
    shop("INSERT INTO items VALUES (1), (2)")
    others.wait(2)
    until_parked(hub, shop, 2)
    shop("UPDATE items SET n = 1")
    until_parked(hub, shop, 4)
    gate.set()
    recorder.wait(4)
    assert in_order(recorder)


def test_the_next_process_delivers_it(
    hub: pgsignals.Hub, shop: Database, park: Callable[..., None], again: Callable[..., Next]
) -> None:
    """What was parked comes first, in order, to the receiver alone; stop() does not wait for it."""
    park()
    assert not hub.stop(0.2)
    write(shop, 2, first=8)
    second = again()
    second.taken.wait(110)
    second.others.wait(20)
    assert in_order(second.taken)
    assert len(second.taken.items) == 110
    assert {event.values["n"] for event in second.others.items} == {9, 10}
    until_none_parked(shop)
    assert second.hub.stop()


def test_a_receiver_that_a_later_version_does_not_have(
    hub: pgsignals.Hub, shop: Database, park: Callable[..., None]
) -> None:
    """What is kept for it stays, and is told; the receivers that there are go on."""
    park()
    hub.stop(0.2)
    second, later = pgsignals.Hub(), Recorder()
    second.on("items")(later)
    start(second, shop)
    try:
        write(shop, 1, first=8)
        later.wait(10)
        until_parked(second, shop, 90)
    finally:
        second.stop()


def test_a_receiver_that_comes_after_start(
    hub: pgsignals.Hub, shop: Database, park: Callable[..., None], again: Callable[..., Next]
) -> None:
    """It gets what is kept for it before anything later."""
    park()
    hub.stop(0.2)
    taken = again(late=True).taken
    write(shop, 2, first=8)
    taken.wait(110)
    assert in_order(taken)
    assert len(taken.items) == 110


@pytest.mark.parametrize("kind", ["batch", "coroutine", "filter", "blinker"])
def test_each_kind_of_receiver(
    kind: str,
    hub: pgsignals.Hub,
    shop: Database,
    gate: threading.Event,
    others: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever hangs, the others go on, batch receivers among them, and it gets all in the end."""
    # Not all of them get as many as a queue takes.
    monkeypatch.setattr(held_events, "PATIENCE_SECONDS", 0.2)
    taken, batches = Recorder(), Recorder()
    options: dict[str, Any] = {}
    loop = asyncio.new_event_loop()
    runner = threading.Thread(target=loop.run_forever)

    def hangs(event: pgsignals.Event) -> None:
        gate.wait(2 * DEADLINE)
        taken((event.id, event.values["n"]))

    def connected(sender: object, event: pgsignals.Event) -> None:
        hangs(event)

    if kind == "batch":

        @hub.on_batch("items", every=0.01)
        def collects(batch: pgsignals.Batch) -> None:
            gate.wait(2 * DEADLINE)
            for event in batch:
                taken((event.id, event.values["n"]))

    elif kind == "coroutine":
        runner.start()
        options["loop"] = loop

        @hub.on("items")
        async def waits(event: pgsignals.Event) -> None:
            await asyncio.to_thread(gate.wait, 2 * DEADLINE)
            taken((event.id, event.values["n"]))

    elif kind == "filter":
        for number in range(1, 4):
            hub.subscribe(hangs, "items", id=number)
    else:
        for op in ("inserted", "updated"):
            hub.signal("items", op).connect(connected)
    hub.on_batch("items", every=0.01)(lambda batch: [batches(event) for event in batch])
    hub.on("items")(others)
    start(hub, shop, **options)
    try:
        write(shop, 16)
        others.wait(170)
        batches.wait_until(lambda event: event.values["n"] == 16)
        count = 51 if kind == "filter" else 170
        until_parked(hub, shop, count)
        gate.set()
        until_none_parked(shop)
        assert in_order(taken)
        last = {(key, 16) for key in range(1, 4 if kind == "filter" else 11)}
        assert last <= set(taken.items)
        if kind != "batch":
            assert len(taken.items) == len(set(taken.items)) == count
    finally:
        hub.stop()
        if runner.is_alive():
            loop.call_soon_threadsafe(loop.stop)
            runner.join()
        loop.close()


def test_one_that_hangs_when_it_is_called_again(
    hub: pgsignals.Hub, shop: Database, gate: threading.Event, others: Recorder, recorder: Recorder
) -> None:
    """Calls of other receivers that are made again do not wait for it, nor does the cursor."""
    tries: dict[str, int] = defaultdict(int)

    @hub.on("items", "inserted", backoff=0.01)
    def hangs(event: pgsignals.Event) -> None:
        tries[event.uid] += 1
        if tries[event.uid] == 1:
            raise RuntimeError("once")
        gate.wait(2 * DEADLINE)
        recorder((event.id, 0))

    @hub.on("items", "inserted", backoff=0.01)
    def raises(event: pgsignals.Event) -> None:
        tries[f"{event.uid} too"] += 1
        if tries[f"{event.uid} too"] == 1:
            raise RuntimeError("once")
        others(event)

    start(hub, shop)
    shop("INSERT INTO items SELECT generate_series(1, %s)", (MANY,))
    others.wait(MANY)
    until_parked(hub, shop, MANY)
    gate.set()
    assert sorted(recorder.wait(MANY)) == [(key, 0) for key in range(1, MANY + 1)]
    until_none_parked(shop)


def test_one_that_raises_when_it_comes_back(
    hub: pgsignals.Hub, shop: Database, gate: threading.Event, others: Recorder, recorder: Recorder
) -> None:
    """What was parked is a dead letter then, though the outbox has lost it, and can be retried."""
    broken = threading.Event()
    broken.set()

    @hub.on("items", retries=0)
    def hangs(event: pgsignals.Event) -> None:
        gate.wait(2 * DEADLINE)
        if broken.is_set() and event.id <= 5:
            raise RuntimeError("poison")
        recorder(event.id)

    hub.on("items")(others)
    start(hub, shop)
    shop("INSERT INTO items SELECT generate_series(1, %s)", (MANY,))
    until_parked(hub, shop, MANY)
    listed = run("dead-letters", "list", "--json", "--dsn", shop.dsn)
    assert json.loads("".join(listed.out)) == {"dead_letters": []}
    shop("TRUNCATE pgsignals.outbox")
    gate.set()
    recorder.wait(MANY - 5)
    until_none_parked(shop)
    assert shop("SELECT count(*) FROM pgsignals.dead_letters") == [(5,)]
    broken.clear()
    with shop.connection.cursor() as cursor:
        assert retry(cursor, None) == 5
    assert sorted(recorder.wait(MANY)) == list(range(1, MANY + 1))
    eventually(lambda: shop("SELECT FROM pgsignals.dead_letters"), lambda rows: not rows)


def test_two_receivers_of_one_name(
    hub: pgsignals.Hub, shop: Database, gate: threading.Event, others: Recorder
) -> None:
    """Each has its own events kept, and gets them from the next process too."""

    def receivers(hub: pgsignals.Hub, gate: threading.Event) -> list[Recorder]:
        found = [Recorder(), Recorder()]
        for each in found:
            hub.subscribe(lambda e, each=each: (gate.wait(2 * DEADLINE), each(e.id)), "items")
        hub.on("items")(others)
        return found

    receivers(hub, gate)
    start(hub, shop)
    shop("INSERT INTO items SELECT generate_series(1, %s)", (MANY,))
    until_parked(hub, shop, 2 * MANY)
    hub.stop(0.2)
    second, opened = pgsignals.Hub(), threading.Event()
    opened.set()
    found = receivers(second, opened)
    start(second, shop)
    try:
        for each in found:
            assert sorted(each.wait(MANY)) == list(range(1, MANY + 1))
    finally:
        second.stop()


def test_all_receivers_hang(
    hub: pgsignals.Hub, shop: Database, gate: threading.Event, recorder: Recorder
) -> None:
    """Reading stops, and nothing is parked for the sake of nobody; all comes when they go on."""
    for _ in range(2):
        hub.subscribe(lambda event: (gate.wait(2 * DEADLINE), recorder(event.id)), "items")
    start(hub, shop)
    write = "INSERT INTO items SELECT generate_series(%s, %s)"
    read = 10 * QUEUE_SIZE
    shop(write, (1, read))
    eventually(hub.status, lambda status: status.unacknowledged == read)
    shop(write, (read + 1, 40 * QUEUE_SIZE))
    # Only what had been read is in memory, however far it looks.
    eventually(lambda: hub.status().outbox, lambda box: box.consumers[0].lag == 40 * QUEUE_SIZE)
    assert hub.status().unacknowledged == read
    assert parked(shop) == 0
    gate.set()
    recorder.wait(2 * 40 * QUEUE_SIZE)


def test_accounts_that_fill_one_after_the_other() -> None:
    """A receiver goes on once it has taken what another holds, not while it holds less so far."""
    registry = Registry()
    first = registry.subscribe(lambda event: None, "items", (), {})
    second = registry.subscribe(print, "items", (), {})
    ledger, lease = Ledger(registry, most=2), Lease(math.inf)

    def hold(receiver: Subscription, event: pgsignals.Event) -> Held:
        event._message.page = Page(lease, 1)
        return ledger.hold(receiver, event)

    events = [make_event(number) for number in range(3)]
    for event in events:
        hold(first, event)
    held = hold(second, events[0])
    ledger.look()
    assert ledger.parking == ()
    held.release()
    ledger.look()
    assert ledger.parking == (receiver_name(first),)


def test_records_that_change_their_keys(
    hub: pgsignals.Hub, shop: Database, gate: threading.Event, others: Recorder
) -> None:
    """Their events come in order to a receiver that hung, over all keys that they had."""
    taken = Recorder()

    @hub.on("items")
    def hangs(event: pgsignals.Event) -> None:
        gate.wait(2 * DEADLINE)
        taken(event.values["n"])

    hub.on("items")(others)
    start(hub, shop)
    shop("INSERT INTO items VALUES (1)")
    for n in range(1, MANY):
        shop("UPDATE items SET n = %s, id = id + %s", (n, n % 3))
    others.wait(MANY)
    until_parked(hub, shop, MANY)
    gate.set()
    assert taken.wait(MANY) == list(range(MANY))


def test_cancelled_while_events_are_kept(
    hub: pgsignals.Hub, shop: Database, gate: threading.Event, others: Recorder, recorder: Recorder
) -> None:
    """After cancel() no call begins, and nothing is kept."""
    subscription = hub.subscribe(lambda event: (recorder(event), gate.wait(2 * DEADLINE)), "items")
    hub.on("items")(others)
    start(hub, shop)
    write(shop, 8)
    until_parked(hub, shop, 90)
    begun = len(recorder.items)
    subscription.cancel()
    gate.set()
    until_none_parked(shop)
    assert len(recorder.items) == begun


def test_what_is_kept_for_too_long(
    hub: pgsignals.Hub, shop: Database, park: Callable[..., None]
) -> None:
    """Past the retention it is dropped, and a Gap names the receiver that has lost it."""
    gaps = Recorder()
    hub.on_gap(gaps)
    park(lease=1.0)
    shop("UPDATE pgsignals.parked SET at = at - interval '4 days' WHERE number < 5")
    with shop.connection.cursor() as cursor:
        tidy(cursor)
    assert parked(shop) == 45
    [gap] = gaps.wait(1)
    assert gap.reason == "retention"
    assert "hangs" in gap.detail
    eventually(lambda: shop("SELECT FROM pgsignals.parked_lost"), lambda rows: not rows)
    shop("UPDATE pgsignals.settings SET retention_bytes = 1000")
    with shop.connection.cursor() as cursor:
        tidy(cursor)
    assert 0 < parked(shop) < 45


def test_commands_tell_of_it(hub: pgsignals.Hub, shop: Database, park: Callable[..., None]) -> None:
    """`consumers list` and `doctor` say for whom how much is kept, which is no dead letter."""
    park()
    listed = "\n".join(run("consumers", "list", "--dsn", shop.dsn).out)
    assert "90 events kept for the receiver" in listed
    found = json.loads("".join(run("consumers", "list", "--json", "--dsn", shop.dsn).out))
    assert [each["events"] for each in found["parked"]] == [90]
    assert found["consumers"][0]["dead_letters"] == 0
    checks = json.loads("".join(run("doctor", "--json", "--dsn", shop.dsn).out))["checks"]
    [check] = [each for each in checks if each["check"] == "slow receivers"]
    assert check["level"] == "warn"
    assert "90 of 'mailer'" in check["message"]


@pytest.mark.parametrize("target", ["now", "earliest"])
def test_a_consumer_that_is_reset(
    target: str,
    hub: pgsignals.Hub,
    shop: Database,
    park: Callable[..., None],
    again: Callable[..., Next],
) -> None:
    """What was kept is skipped with the rest, or comes again in its place among the rest."""
    park()
    hub.stop(0.2)
    # It does not wait any longer for the thread that reads, which gives the claim up at its end.
    eventually(lambda: shop("SELECT holder FROM pgsignals.consumers"), [(None,)].__eq__)
    assert run("consumers", "reset", "mailer", "--to", target, "--dsn", shop.dsn).code == 0
    second = again()
    write(shop, 1, first=8)
    second.taken.wait_until(lambda item: item == (10, 9))
    assert in_order(second.taken)
    until_parked(second.hub, shop, 0)
    assert len(second.taken.items) == (10 if target == "now" else 100)
    assert second.hub.stop()


def test_a_consumer_that_is_forgotten(
    hub: pgsignals.Hub, shop: Database, park: Callable[..., None]
) -> None:
    """Without a name, what is kept goes with the process."""
    park(name=None)
    hub.stop(0.2)
    until_none_parked(shop)


CONSUME = """
import os, random, sys, threading, time
import pgsignals
from pgsignals.dispatch import isolation
from pgsignals.dispatch import held_events as holding

isolation.SLOW_SECONDS, isolation.QUIET_SECONDS, holding.PATIENCE_SECONDS = 0.005, 0.2, 0.1
hangs, partitions, seed = sys.argv[1] == "hangs", int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)

def receiver(number):
    def receive(event):
        if hangs and number and chance.random() < 0.03:
            time.sleep(chance.choice([0.02, 0.1, 3600]))  # The hanging that is tested.
        line = f"{number} {event.values['record']} {event.values['n']}\\n"
        os.write(1, line.encode())
    receive.__qualname__ = f"receive{number}"
    return receive

for number in range(3):
    pgsignals.on("items")(receiver(number))
pgsignals.start(os.environ["PGSIGNALS_DSN"], [pgsignals.watch("items", extra=["record", "n"])],
                delivery="outbox", name="mailer", workers=3, queue_size=15,
                partitions=partitions, lease=2.0)
os.write(1, b"started\\n")
pgsignals.wait()
"""


@pytest.mark.parametrize(("partitions", "seed"), [(1, 1), (3, 2)])
def test_killed_while_events_are_kept(
    partitions: int, seed: int, each_dsn: str, each_db: Database
) -> None:
    """After kill -9 at any moment nothing is missing, nor behind what came later of its record."""
    chance = random.Random(seed)
    each_db("CREATE TABLE items (id bigint PRIMARY KEY, record int, n int)")
    each_db("INSERT INTO items SELECT r, r, 0 FROM generate_series(0, 11) r")
    last = dict.fromkeys(range(12), 0)
    most = 0
    runs: list[list[str]] = []

    def finished() -> bool:
        return {tuple(map(int, line.split())) for lines in runs for line in lines} >= {
            (number, record, n) for number in range(3) for record, n in last.items()
        }

    for turn in range(4):
        mode = "hangs" if turn < 3 else "ends"
        program = Program("-c", CONSUME, mode, str(partitions), str(seed + turn), dsn=each_dsn)
        lines: list[str] = []
        runs.append(lines)
        try:
            while (line := program.out()) != "started":
                lines.append(line)
            for _ in range(300 if mode == "hangs" else 1):
                record = chance.randrange(12)
                last[record] += 1
                # Where partitions share the records, a changed key is another record's.
                moved = partitions == 1 and last[record] % 5 == 0
                each_db(
                    "UPDATE items SET n = %s, id = id + %s WHERE record = %s",
                    (last[record], 100 * moved, record),
                )
            if turn == 0:
                # At once, or when the receiver that hangs has done so for long enough.
                eventually(lambda: parked(each_db), bool)
            most = max(most, parked(each_db))
            if mode == "ends":
                while not finished():
                    lines.append(program.out())
                eventually(lambda: parked(each_db), lambda count: count == 0)
        finally:
            program.process.kill()
            lines += program.end().out
    assert most > 0, "nothing was kept: the test proves nothing"
    for number in range(3):
        for record, final in last.items():
            reached = 0
            for lines in runs:
                found = [line.split() for line in lines]
                got = [int(n) for k, r, n in found if (int(k), int(r)) == (number, record)]
                if got:
                    assert got[0] <= reached + 1
                    assert got == list(range(got[0], got[0] + len(got)))
                    reached = max(reached, got[-1])
            assert reached == final
