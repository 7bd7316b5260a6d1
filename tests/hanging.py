"""Outbox delivery to a receiver that hangs."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

import pgsignals
from tests.conftest import DEADLINE, Database, Recorder
from tests.waiting import eventually

QUEUE_SIZE = 20


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


def parked(shop: Database) -> int:
    [(count,)] = shop("SELECT count(*) FROM pgsignals.parked")
    return int(count)


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
