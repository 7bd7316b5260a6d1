"""Receivers that are slow for every record: set aside, and nobody else waits for them."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pgsignals import Event, Gap
from pgsignals.dispatch import isolation
from pgsignals.dispatch.dispatcher import Dispatcher
from pgsignals.dispatch.in_process import InProcess
from pgsignals.dispatch.registry import Registry, Subscription
from tests.broadcasters import TOPIC, message
from tests.conftest import DEADLINE, Recorder
from tests.waiting import eventually

WORKERS = 4


class Setup:
    """A dispatcher with receivers, and no database."""

    def __init__(self, queue_size: int = 10_000) -> None:
        self.registry = Registry()
        self.registry.bind([TOPIC])
        self.failures = Recorder()
        self.gaps = Recorder()
        self.shed = Recorder()
        self.in_process = InProcess(
            self.registry, lambda receiver, event, error: self.failures(error), isolating=True
        )
        self.dispatcher = Dispatcher([self.in_process], WORKERS, queue_size, self.gaps, self.shed)
        self._sequence = 0

    def on(self, fn: Callable[[Event], object], **filters: Any) -> Subscription:
        """A receiver of all events, or of one record's."""
        return self.registry.subscribe(fn, "t", (), filters)

    def emit(self, *keys: int) -> None:
        """An event of each of these records."""
        self._sequence += 1
        self.dispatcher.submit(message(self._sequence, *((key,) for key in keys)))

    def move(self, old: int, new: int) -> None:
        """A change of a record's key."""
        self._sequence += 1
        self.dispatcher.submit(message(self._sequence, (new, old), moved=True))

    def settle(self) -> None:
        """Wait until all that was emitted is handled."""
        settled = threading.Event()
        self.dispatcher.settle(settled.set)
        assert settled.wait(DEADLINE)

    def until_aside(self, count: int = 1) -> None:
        """Wait until so many receivers are set aside."""
        eventually(
            lambda: len({each.key for each in self.dispatcher.isolated}),
            lambda found: found == count,
        )


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("pgsignals-")]


@contextmanager
def running(queue_size: int = 10_000) -> Iterator[Setup]:
    """A dispatcher that runs, and leaves no thread behind."""
    made = Setup(queue_size)
    made.dispatcher.start()
    try:
        yield made
        assert made.dispatcher.stop(DEADLINE)
    finally:
        made.dispatcher.stop(0)
    eventually(_threads, lambda names: not names)


@pytest.fixture
def setup() -> Iterator[Setup]:
    """A dispatcher that runs, and leaves no thread behind."""
    with running() as made:
        yield made


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a receiver waits for, which is set at the end at the latest."""
    made = threading.Event()
    yield made
    made.set()


# Records of which each of the workers has one.
RECORDS = [
    next(i for i in range(1000) if hash((i,)) % WORKERS == worker) for worker in range(WORKERS)
]


@pytest.mark.parametrize("events", [1, 20])
def test_the_others_go_on_behind_a_call(events: int, setup: Setup, gate: threading.Event) -> None:
    """What waits in the same message and in later ones is handled while a receiver is stuck."""
    before, after = Recorder(), Recorder()
    stuck = Recorder()
    setup.on(lambda event: before(event._message.sequence))
    setup.on(lambda event: (stuck(event._message.sequence), gate.wait(DEADLINE)))
    setup.on(lambda event: after(event._message.sequence))
    for _ in range(3):
        setup.emit(*[RECORDS[0]] * events)
    after.wait(3 * events)
    assert before.items == after.items == sorted(before.items)
    assert stuck.items == [1]
    assert setup.dispatcher.depth == 3 * events
    assert setup.dispatcher.oldest > 0
    gate.set()
    stuck.wait(3 * events)
    assert stuck.items == before.items
    setup.settle()
    assert setup.dispatcher.depth == 0


@pytest.mark.parametrize("kind", ["function", "method"])
def test_blinker_receivers_are_set_aside(kind: str, setup: Setup, gate: threading.Event) -> None:
    """Functions and bound methods, and they are held no longer than their calls."""
    seen, others = Recorder(), Recorder()

    class Slow:
        def receive(self, sender: object, event: Event) -> None:
            gate.wait(DEADLINE)
            seen((sender, event.id))

    def receive(sender: object, event: Event) -> None:
        gate.wait(DEADLINE)
        seen((sender, event.id))

    slow = Slow()
    setup.registry.signal("t", "updated").connect(receive if kind == "function" else slow.receive)
    setup.on(others)
    setup.emit(*RECORDS)
    setup.emit(*RECORDS)
    others.wait(2 * WORKERS)
    setup.until_aside()
    assert seen.items == []
    gate.set()
    setup.settle()
    assert sorted(seen.items) == sorted([("t", record) for record in RECORDS] * 2)
    del slow, receive
    gc.collect()
    setup.emit(*RECORDS)
    setup.settle()
    assert len(seen.items) == 2 * WORKERS
    assert len(others.items) == 3 * WORKERS


def test_who_is_alone_may_take_its_time(
    setup: Setup, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that nobody waits for stays with the workers, whose reader pauses for it."""
    left, is_alone = Recorder(), Registry.is_alone

    def noted(self: Registry, receiver: object) -> bool:
        alone = is_alone(self, receiver)
        left(alone)
        return alone

    monkeypatch.setattr(Registry, "is_alone", noted)
    entered = Recorder()
    setup.on(lambda event: (entered(event), gate.wait(DEADLINE)))
    setup.emit(RECORDS[0])
    entered.wait(1)
    # The second time that the monitor finds it slow, the first has had its consequences.
    assert left.wait(2) == [True, True]
    assert setup.dispatcher.aside == ()
    others = Recorder()
    setup.on(others)
    setup.emit(RECORDS[0])
    others.wait(1)
    assert len(setup.dispatcher.aside) == 1


def test_a_slow_receiver_keeps_its_parallel_calls(setup: Setup, gate: threading.Event) -> None:
    """It is called from as many threads as there are workers, and record by record in order."""
    entered = Recorder()
    setup.on(lambda event: (entered(event.id), gate.wait(DEADLINE)))
    setup.on(lambda event: None)
    setup.emit(*RECORDS)
    assert sorted(entered.wait(WORKERS)) == sorted(RECORDS)


def test_what_finds_no_room_is_dropped_for_the_slow_alone(gate: threading.Event) -> None:
    """A Gap that names it comes when there is room, before anything later reaches it."""
    with running(queue_size=40) as setup:
        order, fast = Recorder(), Recorder()

        def slow(event: Event) -> None:
            gate.wait(DEADLINE)
            order(event._message.sequence)

        setup.gaps = order
        setup.dispatcher._announce_loss = order
        setup.on(slow)
        setup.on(fast)
        for number in range(1, 61):
            setup.emit(RECORDS[0])
            fast.wait(number)
        assert setup.dispatcher.shedding
        assert not setup.dispatcher.full
        [name] = setup.dispatcher.aside_full
        assert name.endswith("slow")
        assert setup.dispatcher.shed == sum(setup.shed.items) == 50
        assert order.items == []
        gate.set()
        gap = order.wait_until(lambda item: isinstance(item, Gap))[-1]
        assert gap.reason == "overflow"
        assert name in gap.detail
        setup.settle()
        assert not setup.dispatcher.shedding
        setup.emit(RECORDS[0])
        order.wait_until(lambda item: item == 61)
        items = [item for item in order.items if item is not gap]
        assert items == [*range(1, 11), 61]
        assert order.items.index(gap) < order.items.index(61)
        assert len(fast.items) == 61


def test_what_is_dropped_while_it_stops(gate: threading.Event) -> None:
    """At stop a loss is announced, and what is queued by then is handled."""
    with running(queue_size=40) as setup:
        seen, fast = Recorder(), Recorder()
        setup.on(lambda event: (gate.wait(DEADLINE), seen(event._message.sequence)))
        setup.on(fast)
        for number in range(1, 31):
            setup.emit(RECORDS[0])
            fast.wait(number)
        stopping = threading.Thread(target=setup.dispatcher.stop, args=(DEADLINE,))
        stopping.start()
        [gap] = setup.gaps.wait(1)
        gate.set()
        stopping.join(DEADLINE)
        assert seen.items == list(range(1, 11))
        assert gap.reason == "overflow"


def test_one_that_only_catches_up_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """A receiver that was slow once gets all of a burst that is larger than its queue."""
    with running(queue_size=40) as setup:
        seen, others = Recorder(), Recorder()
        setup.on(lambda event: (event._message.sequence == 1 and gate.wait(DEADLINE), seen(1)))
        setup.on(others)
        setup.emit(RECORDS[0])
        setup.until_aside()
        gate.set()
        # Not in time for a machine that is busy otherwise.
        monkeypatch.setattr(isolation, "SLOW_SECONDS", DEADLINE)
        for _ in range(1000):
            setup.emit(RECORDS[0])
        setup.settle()
        assert len(seen.items) == len(others.items) == 1001
        assert setup.dispatcher.shed == 0


def test_it_goes_back_to_the_workers(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """After a time without slow calls, its thread and queue are given back."""
    monkeypatch.setattr(isolation, "QUIET_SECONDS", 0.1)
    seen = Recorder()

    def slow(event: Event) -> None:
        gate.wait(DEADLINE)
        seen(threading.current_thread().name)

    setup.on(slow)
    setup.on(lambda event: None)
    setup.emit(*RECORDS)
    eventually(_threads, lambda names: len(names) == 2 * WORKERS + 1)
    gate.set()
    eventually(_threads, lambda names: len(names) == WORKERS + 1)
    assert setup.dispatcher.aside == ()
    setup.emit(*RECORDS)
    setup.settle()
    assert len(seen.items) == 2 * WORKERS


def test_threads_are_bounded(
    setup: Setup, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond eight receivers set aside, a worker waits for the ninth that is slow."""
    refused, too_many = Recorder(), isolation.Isolation._too_many

    def noted(self: isolation.Isolation, key: Hashable) -> bool:
        if found := too_many(self, key):
            refused(key)
        return found

    monkeypatch.setattr(isolation.Isolation, "_too_many", noted)
    seen = Recorder()
    for _ in range(isolation.MOST_ISOLATED + 3):
        setup.on(lambda event: gate.wait(DEADLINE))
    setup.on(seen)
    setup.emit(*RECORDS)
    setup.until_aside(isolation.MOST_ISOLATED)
    # Twice for each worker: the monitor has found the ninth slow, and gone on.
    refused.wait(2 * WORKERS)
    assert len(_threads()) <= (isolation.MOST_ISOLATED + 1) * WORKERS + 1
    assert seen.items == []
    gate.set()
    seen.wait(WORKERS)


def test_settle_waits_for_those_set_aside(setup: Setup, gate: threading.Event) -> None:
    """All that was submitted before is handled by slow receivers, too."""
    settled = threading.Event()
    others = Recorder()
    setup.on(lambda event: gate.wait(DEADLINE))
    setup.on(others)
    setup.emit(RECORDS[0])
    setup.dispatcher.settle(settled.set)
    # All others have handled that, and more: only the one that is set aside has not.
    setup.until_aside()
    setup.emit(RECORDS[0])
    others.wait(2)
    assert not settled.is_set()
    gate.set()
    assert settled.wait(DEADLINE)


def test_announcements_do_not_wait_for_those_set_aside(setup: Setup, gate: threading.Event) -> None:
    """A Gap reaches everybody while a receiver is stuck, and ahead of what comes later."""
    order, slow, entered = Recorder(), Recorder(), threading.Event()
    setup.on(lambda event: (entered.set(), gate.wait(DEADLINE), slow(event._message.sequence)))
    setup.on(lambda event: order(event._message.sequence))
    setup.emit(RECORDS[0])
    assert entered.wait(DEADLINE)
    setup.dispatcher.announce(lambda: (order("gap"), slow("gap")))
    setup.emit(RECORDS[0])
    assert [item for item in order.wait(3) if item != 1] == ["gap", 2]
    gate.set()
    assert [item for item in slow.wait(3) if item != 1] == ["gap", 2]


def test_cancelled_while_set_aside(setup: Setup, gate: threading.Event) -> None:
    """No call begins after cancel() but the one that has begun."""
    entered, others = Recorder(), Recorder()
    subscription = setup.on(lambda event: (entered(event), gate.wait(DEADLINE)))
    setup.on(others)
    for _ in range(5):
        setup.emit(RECORDS[0])
    others.wait(5)
    subscription.cancel()
    gate.set()
    setup.settle()
    assert len(entered.items) == 1


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_one_set_aside_raises(
    error: type[BaseException], setup: Setup, gate: threading.Event
) -> None:
    """Whatever it raises is reported, in its first slow call and in later ones."""
    others = Recorder()

    def slow(event: Event) -> None:
        gate.wait(DEADLINE)
        raise error

    setup.on(slow)
    setup.on(others)
    for _ in range(3):
        setup.emit(RECORDS[0])
    others.wait(3)
    gate.set()
    setup.settle()
    assert [type(each) for each in setup.failures.items] == [error] * 3


@pytest.mark.parametrize("first", [True, False])
def test_one_set_aside_stops_everything(first: bool, setup: Setup, gate: threading.Event) -> None:
    """stop() called in its first slow call, or in a later one, returns and waits for nobody."""
    outcome, others = Recorder(), Recorder()
    calls: list[Event] = []

    def slow(event: Event) -> None:
        calls.append(event)
        gate.wait(DEADLINE)
        if first or len(calls) > 1:
            began = time.monotonic()
            outcome((setup.dispatcher.stop(DEADLINE), time.monotonic() - began))

    setup.on(slow)
    setup.on(others)
    for _ in range(3):
        setup.emit(RECORDS[0])
    others.wait(3)
    gate.set()
    [(drained, seconds)] = outcome.wait(1)
    assert drained
    assert seconds < DEADLINE / 2
    eventually(_threads, lambda names: not names)
    assert len(calls) == (1 if first else 2)


@pytest.mark.parametrize("moved", [False, True])
def test_one_set_aside_blocks_for_ever(moved: bool) -> None:
    """stop() returns within its timeout, and the others are called with all that had arrived."""
    setup, release, others = Setup(), threading.Event(), Recorder()
    setup.dispatcher.start()
    setup.on(lambda event: release.wait(2 * DEADLINE))
    setup.on(others)
    setup.emit(*RECORDS)
    if moved:
        setup.move(RECORDS[0], RECORDS[1])
        setup.move(RECORDS[1], RECORDS[2])
    began = time.monotonic()
    assert not setup.dispatcher.stop(0.5)
    assert 0.5 <= time.monotonic() - began < DEADLINE / 2
    assert len(others.items) == WORKERS + 2 * moved
    release.set()
    eventually(_threads, lambda names: not names)


def test_a_record_that_moves_past_one_set_aside(setup: Setup, gate: threading.Event) -> None:
    """Its events stay in order for the slow receiver, which nobody else waits for."""
    slow, fast = Recorder(), Recorder()
    setup.on(lambda event: (gate.wait(DEADLINE), slow(event._message.sequence)), id=RECORDS[0])
    every = setup.on(
        lambda event: (
            event._message.sequence == 1 and gate.wait(DEADLINE),
            slow(event._message.sequence),
        )
    )
    setup.on(lambda event: fast(event._message.sequence))
    setup.emit(RECORDS[0])
    fast.wait(1)
    setup.move(RECORDS[0], RECORDS[1])
    setup.move(RECORDS[1], RECORDS[2])
    setup.emit(RECORDS[2])
    fast.wait(4)
    assert slow.items == []
    gate.set()
    setup.settle()
    # The first two reached both of the receivers.
    assert sorted(slow.items) == [1, 1, 2, 2, 3, 4]
    every.cancel()
    assert [each for each in slow.items if each > 2] == [3, 4]


@pytest.mark.parametrize("seed", range(4))
def test_order_per_record_over_all_changes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However receivers go aside and come back, each gets each record's events once, in order."""
    monkeypatch.setattr(isolation, "SLOW_SECONDS", 0.002)
    monkeypatch.setattr(isolation, "QUIET_SECONDS", 0.004)
    choose = random.Random(seed)
    with running(queue_size=400_000) as setup:
        # By receiver and record, what came; a record goes by its number, over its keys.
        seen: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(4)]
        record_of = {key: key for key in range(24)}
        keys = list(range(24))
        record_at: dict[int, int] = {}
        asides = set()
        delays = [
            {n: choose.choice([0, 0.005, 0.012]) for n in range(2, 2000) if choose.random() < 0.03}
            for _ in seen
        ]

        def receiver(number: int) -> Callable[[Event], None]:
            def receive(event: Event) -> None:
                sequence = event._message.sequence
                if number and sequence in delays[number]:
                    time.sleep(delays[number][sequence])  # The slowness that is tested.
                seen[number][record_at[sequence]].append(sequence)

            return receive

        for number in range(len(seen)):
            setup.on(receiver(number))
        expected: dict[int, list[int]] = defaultdict(list)
        for sequence in range(1, 2000):
            record = choose.randrange(24)
            record_at[sequence] = record
            expected[record].append(sequence)
            if choose.random() < 0.3:
                old, keys[record] = keys[record], len(record_of)
                record_of[keys[record]] = record
                setup.move(old, keys[record])
            else:
                setup.emit(keys[record])
            asides.update(setup.dispatcher.aside)
            if sequence % 50 == 0:
                time.sleep(0.01)  # For the receivers to come and go between bursts.
        setup.settle()
        assert asides, "no receiver was set aside: the test proves nothing"
        for each in seen:
            assert dict(each) == dict(expected)
        assert setup.dispatcher.depth == 0
        assert setup.dispatcher.shed == 0


def test_a_fork_while_one_is_set_aside(setup: Setup, gate: threading.Event) -> None:
    """The child has neither its thread nor a lock that is held, and may set aside its own."""
    others = Recorder()
    setup.on(lambda event: gate.wait(DEADLINE))
    setup.on(others)
    setup.emit(*RECORDS)
    others.wait(WORKERS)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert _threads() == []
            child, seen, release = Setup(), Recorder(), threading.Event()
            child.on(lambda event: release.wait(DEADLINE))
            child.on(seen)
            child.dispatcher.start()
            child.emit(*RECORDS)
            seen.wait(WORKERS)
            release.set()
            code = 0 if child.dispatcher.stop(DEADLINE) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
