"""Receivers under test without a database: pgsignals.testing.simulated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import pgsignals
from pgsignals import Batch, Event, Gap, Hub, watch
from pgsignals.testing import EventLog, simulated
from tests.conftest import Recorder


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column("email_address")


class OrderLine(Base):
    __tablename__ = "order_lines"
    order_id: Mapped[int] = mapped_column(primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub that never sees a database."""
    made = Hub()
    yield made
    made.stop()


def test_it_runs_the_default_hub() -> None:
    """Receivers of the module-level decorators are called in the test's own thread."""
    seen: list[tuple[Event, int]] = []

    def receive(event: Event) -> None:
        seen.append((event, threading.get_ident()))

    subscription = pgsignals.subscribe(receive, User, "updated")
    try:
        with simulated() as sim:
            event = sim.emit(
                User, "updated", id=1, values={"email": "new@example.org"}, context={"user_id": 7}
            )
    finally:
        subscription.cancel()
    assert seen == [(event, threading.get_ident())]
    assert (event.model, event.op, event.id, event.key) == (User, "updated", 1, {"id": 1})
    assert event.values == {"email": "new@example.org"}
    assert event.context == {"user_id": 7}
    assert (event.schema, event.table) == ("public", "users")
    assert event.at.tzinfo is not None
    assert not pgsignals.default_hub.running


def test_events_are_those_that_the_database_would_give(hub: Hub) -> None:
    """``old`` and ``changed`` say what differs, in the columns that the watcher carries."""
    watcher = watch(User, "updated", columns=["email"])
    with simulated([watcher], hub=hub) as sim:
        changed = sim.emit(User, "updated", id=1, values={"email": "b"}, old={"email": "a"})
        same = sim.emit(User, "updated", id=1, values={"email": "b"})
        cut = sim.emit(User, "updated", id=1, truncated=True)
        moved = sim.emit(User, "updated", id=2, old={"id": 1}, values={"email": "b"})
    assert (changed.values, changed.old, changed.changed) == (
        {"email": "b"}, {"email": "a"}, {"email"},
    )  # fmt: skip
    assert (same.old, same.changed) == ({"email": "b"}, frozenset())
    assert (cut.truncated, cut.values, cut.id) == (True, {}, 1)
    assert (moved.id, moved.old["id"], moved.changed) == (2, 1, {"id"})
    assert len({event.uid for event in (changed, same, cut, moved)}) == 4


def test_filters_choose_records(hub: Hub) -> None:
    """A receiver of single records gets its own, by the new and by the former value."""
    seen: list[Any] = []
    hub.subscribe(lambda event: seen.append(event.id), "orders", "updated", user_id=7)
    with simulated([watch("orders", "updated", extra=["user_id"])], hub=hub) as sim:
        sim.emit("orders", "updated", id=1, values={"user_id": 8})
        sim.emit("orders", "updated", id=2, values={"user_id": 7})
        sim.emit("orders", "updated", id=3, values={"user_id": 8}, old={"user_id": 7})
    assert seen == [2, 3]


def test_keys_of_several_columns(hub: Hub) -> None:
    """A composite key is a tuple, or a mapping, which also names the key of a plain table."""
    with simulated(hub=hub) as sim:
        by_tuple = sim.emit(OrderLine, "inserted", id=(1, 2))
        by_name = sim.emit(OrderLine, "inserted", id={"line": 2, "order_id": 1})
        plain = sim.emit("lines", "inserted", id={"a": 1, "b": 2})
        with pytest.raises(pgsignals.ConfigurationError, match="does not fit the key"):
            sim.emit(OrderLine, "inserted", id=1)
    assert by_tuple.id == by_name.id == (1, 2)
    assert by_tuple.key == {"order_id": 1, "line": 2}
    assert (plain.id, plain.key) == ((1, 2), {"a": 1, "b": 2})


def test_labels(hub: Hub) -> None:
    """A labelled watcher's events go by its label and carry its model."""
    seen: list[Event] = []
    hub.on("shipped")(seen.append)
    orders = Table(
        "orders", MetaData(), Column("id", Integer, primary_key=True), Column("s", String)
    )
    with simulated([watch(orders, "updated", label="shipped")], hub=hub) as sim:
        sim.emit("shipped", "updated", id=1)
        with pytest.raises(pgsignals.ConfigurationError, match="No watcher delivers"):
            sim.emit(orders, "updated", id=1)
    assert [(event.label, event.model) for event in seen] == [("shipped", orders)]


def test_receivers_must_fit_the_watchers(hub: Hub) -> None:
    """With watchers, a receiver of what none delivers is refused, before and during the block."""
    subscription = hub.subscribe(print, User, "deleted")
    with (
        pytest.raises(pgsignals.ReceiverError, match="no watcher delivers"),
        simulated([(User, "updated")], hub=hub),
    ):
        pytest.fail("the block must not run")
    assert not hub.running
    subscription.cancel()
    with (
        simulated([(User, "updated")], hub=hub),
        pytest.raises(pgsignals.ReceiverError, match="no watcher delivers"),
    ):
        hub.subscribe(print, User, "deleted")


def test_events_must_fit_the_watchers(hub: Hub) -> None:
    """An event with a column that its watcher does not carry would not exist."""
    with simulated([User], hub=hub) as sim:
        with pytest.raises(pgsignals.ConfigurationError, match=r"'email'.*its key only.*extra="):
            sim.emit(User, "updated", id=1, values={"email": "a"})
        with pytest.raises(pgsignals.ConfigurationError, match="only updates have it"):
            sim.emit(User, "inserted", id=1, old={"id": 2})
        with pytest.raises(pgsignals.ConfigurationError, match="'update' is not an operation"):
            sim.emit(User, "update", id=1)


def test_a_filter_on_a_column_that_the_event_lacks(hub: Hub) -> None:
    """Without watchers, a receiver still must not ask for what the event does not carry."""
    hub.subscribe(print, "orders", user_id=7)
    with simulated(hub=hub) as sim, pytest.raises(pgsignals.ReceiverError, match="user_id"):
        sim.emit("orders", "inserted", id=1)


def test_a_receiver_that_raises(hub: Hub) -> None:
    """The error reaches the test, after the other receivers and ``receiver_failed`` were called."""
    seen: list[Event] = []
    failed: list[BaseException] = []

    def fail(event: Event) -> None:
        raise ValueError("no")

    def note(hub: Hub, *, error: BaseException, **_: Any) -> None:
        failed.append(error)

    hub.on(User)(fail)
    hub.on(User)(seen.append)
    with hub.receiver_failed.connected_to(note), simulated(hub=hub) as sim:
        with pytest.raises(ValueError, match="no") as caught:
            sim.emit(User, "inserted", id=1)
        with pytest.raises(ValueError, match="no"):
            sim.emit(User, "inserted", id=2)
    assert [event.id for event in seen] == [1, 2]
    assert failed[0] is caught.value


def test_batches_wait_for_flush(hub: Hub) -> None:
    """Batch receivers are called by ``flush``, and at the end of the block."""
    batches: list[list[Any]] = []

    @hub.on_batch(User, "updated", every=3600)
    def collect(batch: Batch) -> None:
        batches.append(batch.load())

    with simulated(hub=hub) as sim:
        sim.emit(User, "updated", id=1, record="old ann")
        sim.emit(User, "updated", id=1, record="ann")
        sim.emit(User, "updated", id=2, record="bob")
        assert batches == []
        sim.flush()
        assert batches == [["ann", "bob"]]
        sim.emit(User, "updated", id=1)
    assert batches == [["ann", "bob"], ["ann"]]


def test_load_gives_the_record_of_the_test(hub: Hub) -> None:
    """``event.load`` gives what the test says the record is, and asks for it otherwise."""
    with simulated(hub=hub) as sim:
        assert sim.emit(User, "updated", id=1, record="ann").load() == "ann"
        assert sim.emit(User, "updated", id=1).load() == "ann"
        assert sim.emit(User, "deleted", id=1, record=None).load() is None
        with pytest.raises(pgsignals.ConfigurationError, match="record="):
            sim.emit(User, "updated", id=2).load()


def test_gaps(hub: Hub) -> None:
    """Receivers of Gaps are called before ``gap`` returns."""
    seen: list[Gap] = []
    hub.on_gap(seen.append)
    with simulated(hub=hub) as sim:
        found = sim.gap("overflow", detail="too slow")
    assert seen == [found]
    assert (found.reason, found.detail) == ("overflow", "too slow")


def test_streams_signals_and_the_log(hub: Hub) -> None:
    """Everything that hears events of a database hears simulated ones."""
    heard: list[Event] = []

    def receive(sender: Any, *, event: Event) -> None:
        heard.append(event)

    hub.signal(User, "inserted").connect(receive)
    with EventLog(hub) as events, simulated([User], hub=hub) as sim, hub.stream(User) as stream:
        event = sim.emit(User, "inserted", id=1)
        assert stream.get(0) is event
        assert events.wait_for(User, "inserted", id=1) is event
        events.none(User)
        assert hub.status().received == 1
    assert heard == [event]


def test_truncate(hub: Hub) -> None:
    """``truncated`` has no record."""
    with simulated([watch(User, "truncated")], hub=hub) as sim:
        assert sim.emit(User, "truncated").id is None


def test_a_running_hub_is_not_simulated(hub: Hub) -> None:
    """A Hub has one source of events at a time."""
    with simulated(hub=hub):
        with pytest.raises(pgsignals.StateError, match="running already"):
            hub.start("", [User])
        with pytest.raises(pgsignals.StateError, match="running already"), simulated(hub=hub):
            pytest.fail("the block must not run")


def test_snapshots(hub: Hub, recorder: Recorder) -> None:
    """Rows of a backfill can be made up too, with what all watchers of the model ask for."""
    hub.on("orders", "snapshot")(recorder)
    watchers = [
        pgsignals.watch("orders", "updated", columns=["status"]),
        pgsignals.watch("orders", "inserted", extra=["total"]),
    ]
    with simulated(watchers, hub=hub) as simulation:
        simulation.emit("orders", "snapshot", id=1, values={"status": "new", "total": 3})
    with simulated(hub=hub) as simulation:
        simulation.emit("orders", "snapshot", id=2, values={"total": 4})
    assert [(event.id, event.values) for event in recorder.items] == [
        (1, {"status": "new", "total": 3}),
        (2, {"total": 4}),
    ]
