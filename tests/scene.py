"""A Hub at work on one database, in each delivery, and all that it has delivered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg2
import psycopg2.extras
import pytest

import pgsignals
from pgsignals import Event, Hub
from pgsignals.hub.hub import Delivery
from tests.conftest import Database, Recorder


class Scene:
    """A Hub at work on one database, and all that it delivered, in order."""

    def __init__(self, hub: Hub, dsn: str, db: Database, delivery: Delivery) -> None:
        self.hub = hub
        self.delivery = delivery
        self.dsn = dsn
        self.db = db
        self.recorder = Recorder()
        self.gaps = Recorder()
        self._sentinels = 0
        db("CREATE TABLE sentinels (id int PRIMARY KEY)")

    @property
    def whole(self) -> bool:
        """Whether values of any length travel."""
        return self.delivery != "notify"

    def start(self, *watchers: Any, dsn: str | None = None, **options: Any) -> None:
        """Start the Hub."""
        self.hub.start(dsn or self.dsn, watchers, delivery=self.delivery, **options)

    def watch(self, *watchers: Any, dsn: str | None = None) -> Scene:
        """Start the Hub, and record the events of all watchers."""
        self.start(*watchers, ("sentinels", "inserted"), dsn=dsn)
        self.hub.on_gap(self.gaps)
        for target in dict.fromkeys(map(_target, (*watchers, "sentinels"))):
            self.hub.subscribe(self.recorder, target)
        return self

    def events(self) -> list[Event]:
        """All events since the last call, up to one that is made now."""
        self._sentinels += 1
        number = self._sentinels
        self.db("INSERT INTO sentinels VALUES (%s)", [number])
        arrived = self.recorder.wait_until(lambda e: e.table == "sentinels" and e.id == number)
        before = [n for n, e in enumerate(arrived) if e.table == "sentinels" and e.id == number - 1]
        return arrived[before[0] + 1 if before else 0 : -1]

    def brief(self) -> list[tuple[str, Any]]:
        """Like ``events``, only the operation and the id of each."""
        return [(event.op, event.id) for event in self.events()]

    def values(self) -> list[tuple[Any, ...]]:
        """Like ``events``, only the operation and the values of each."""
        return [(event.op, *event.values.values()) for event in self.events()]

    def channels(self, table: str) -> list[str]:
        """The channels on which the triggers of a table notify."""
        return [state.name for state in self.hub.status().watchers if state.table == table]


def _target(watcher: Any) -> Any:
    if isinstance(watcher, pgsignals.Watcher):
        return watcher.label or watcher.model
    return watcher[0] if isinstance(watcher, tuple) else watcher


@pytest.fixture
def scene(hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery) -> Scene:
    """A Hub that is not started yet, and a fresh database on each tested version."""
    return Scene(hub, each_dsn, each_db, delivery)


@pytest.fixture
def items(scene: Scene) -> Scene:
    """The same, with a table of items."""
    scene.db("CREATE TABLE items (id int PRIMARY KEY, name text, owner_id int, price numeric)")
    return scene


@pytest.fixture
def orders(scene: Scene) -> Scene:
    """A partitioned table with two partitions."""
    scene.db(
        "CREATE TABLE orders (id int, region text, note text, PRIMARY KEY (region, id))"
        " PARTITION BY LIST (region);"
        "CREATE TABLE orders_eu PARTITION OF orders FOR VALUES IN ('eu');"
        "CREATE TABLE orders_us PARTITION OF orders FOR VALUES IN ('us')"
    )
    return scene


@pytest.fixture
def writer(items: Scene) -> Iterator[psycopg2.extensions.connection]:
    """Another connection to the same database, not in autocommit mode."""
    with closing(psycopg2.connect(items.dsn)) as connection:
        yield connection
