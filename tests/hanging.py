"""Outbox delivery to a receiver that hangs."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import pgsignals
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually

QUEUE_SIZE = 20
# The events of eight rounds, see ``write``: of ten records, which the first inserts.
PARKED = 90


@pytest.fixture
def shop(each_dsn: str, each_db: Database) -> Database:
    """A database with a table."""
    each_db("CREATE TABLE items (id bigint PRIMARY KEY, n int NOT NULL DEFAULT 0)")
    return each_db


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a receiver hangs in until it is set, at the end at the latest."""
    made = threading.Event()
    yield made
    made.set()


@pytest.fixture
def others() -> Recorder:
    """What the others get."""
    return Recorder()


def start(hub: pgsignals.Hub, shop: Database, **options: Any) -> None:
    options = {"name": "mailer", "workers": 4, "queue_size": QUEUE_SIZE, **options}
    hub.start(shop.dsn, [pgsignals.watch("items", extra=["n"])], delivery="outbox", **options)


def hanging(hub: pgsignals.Hub, gate: threading.Event, others: Recorder, taken: Recorder) -> None:
    """A receiver that hangs until the gate opens, and one that does not."""

    @hub.on("items")
    def hangs(event: pgsignals.Event) -> None:
        gate.wait(2 * DEADLINE)
        taken((event.id, event.values["n"]))

    hub.on("items")(others)


@pytest.fixture
def park(
    hub: pgsignals.Hub, shop: Database, gate: threading.Event, others: Recorder
) -> Callable[..., None]:
    """Starts the Hub, and has all of eight rounds kept for the receiver that hangs."""

    def begin(taken: Recorder | None = None, **options: Any) -> None:
        hanging(hub, gate, others, taken or Recorder())
        start(hub, shop, **options)
        write(shop, 8)
        until_parked(hub, shop, PARKED)

    return begin


@dataclass
class Next:
    """The next process, in which nothing hangs, and what its two receivers get."""

    hub: pgsignals.Hub = field(default_factory=pgsignals.Hub)
    taken: Recorder = field(default_factory=Recorder)
    others: Recorder = field(default_factory=Recorder)

    def receive(self) -> None:
        """Have the receiver that hung, and the other one."""
        opened = threading.Event()
        opened.set()
        hanging(self.hub, opened, self.others, self.taken)


@pytest.fixture
def again(shop: Database) -> Iterator[Callable[..., Next]]:
    """Starts a Hub whose receiver hangs no more, as the next process would.

    Where the receiver comes ``late``, after the start, another one is there before.
    """
    begun: list[Next] = []

    def begin(*, late: bool = False, **options: Any) -> Next:
        found = Next()
        begun.append(found)
        if late:
            found.hub.on("items")(Recorder())
        else:
            found.receive()
        start(found.hub, shop, **options)
        if late:
            found.receive()
        return found

    yield begin
    for each in begun:
        each.hub.stop()


def parked(shop: Database) -> int:
    [(count,)] = shop("SELECT count(*) FROM pgsignals.parked")
    return int(count)


def until_none_parked(shop: Database) -> None:
    """Wait until nothing is kept any more."""
    eventually(lambda: parked(shop), lambda count: count == 0)


def caught_up(hub: pgsignals.Hub) -> bool:
    """Whether the consumer has nothing left to acknowledge."""
    outbox = hub.status().outbox
    assert outbox is not None
    return not any(each.lag for each in outbox.consumers)


def until_parked(hub: pgsignals.Hub, shop: Database, count: int) -> None:
    """Wait until the consumer has gone past all, but for what is parked."""
    eventually(lambda: (caught_up(hub), parked(shop)), lambda found: found == (True, count))


def write(shop: Database, rounds: int, first: int = 0) -> None:
    """Update ten records in each of some rounds."""
    shop("INSERT INTO items SELECT generate_series(1, 10) ON CONFLICT DO NOTHING")
    for n in range(first + 1, first + rounds + 1):
        shop("UPDATE items SET n = %s", (n,))


def in_order(taken: Recorder) -> bool:
    """Whether each record's changes came in their order, each at least once."""
    found: dict[int, list[int]] = defaultdict(list)
    for key, n in taken.items:
        found[key].append(n)
    return all(items == sorted(items) for items in found.values())
