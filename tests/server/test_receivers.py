"""Who gets which event: models, labels, operations, single records, blinker's own receivers."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pgsignals import Hub, ReceiverError, watch
from tests.conftest import DEADLINE, Database, Recorder
from tests.hub_parts import listening


@pytest.fixture(autouse=True)
def tables(db: Database) -> None:
    """Two tables."""
    db("CREATE TABLE users (id bigserial PRIMARY KEY, name text, team_id int, tag text)")
    db("CREATE TABLE posts (blog int, number int, title text, PRIMARY KEY (blog, number))")


def test_operations_are_told_apart(hub: Hub, dsn: str, db: Database) -> None:
    """Receivers of one operation get no other; receivers of none in particular get all."""
    updates, everything = Recorder(), Recorder()
    hub.on("users", "updated")(updates)
    hub.on("users")(everything)
    hub.start(dsn, ["users"])
    db("INSERT INTO users (name) VALUES ('a')")
    db("UPDATE users SET name = 'b'")
    db("DELETE FROM users")
    assert [e.op for e in everything.wait(3)] == ["inserted", "updated", "deleted"]
    assert [e.op for e in updates.items] == ["updated"]


def test_a_labels_events_go_to_the_label(hub: Hub, dsn: str, db: Database) -> None:
    """A labelled watcher's events reach receivers of the label, not those of the table."""
    by_label, by_table = Recorder(), Recorder()
    hub.start(dsn, ["users", watch("users", "inserted", when="NEW.name = 'vip'", label="vip")])
    hub.subscribe(by_label, "vip")
    hub.subscribe(by_table, "users")
    db("INSERT INTO users (name) VALUES ('vip'), ('other')")
    assert [e.label for e in by_table.wait(2)] == [None, None]
    assert [(e.label, e.id) for e in by_label.wait(1)] == [("vip", 1)]


def test_one_record(hub: Hub, dsn: str, db: Database) -> None:
    """A receiver of one id gets that record's events only."""
    seen, last = Recorder(), Recorder()
    hub.start(dsn, ["users"])
    hub.subscribe(seen, "users", id=2)
    hub.subscribe(last, "users", "deleted", id=3)
    db("INSERT INTO users (name) VALUES ('a'), ('b'), ('c')")
    db("DELETE FROM users")
    last.wait(1)
    assert [(e.op, e.id) for e in seen.items] == [("inserted", 2), ("deleted", 2)]


def test_one_record_of_a_composite_key(hub: Hub, dsn: str, db: Database) -> None:
    """id= takes a tuple for a key of several columns, and each column can be asked for."""
    whole, part = Recorder(), Recorder()
    hub.start(dsn, ["posts"])
    hub.subscribe(whole, "posts", id=(1, 2))
    hub.subscribe(part, "posts", number=2)
    db("INSERT INTO posts VALUES (1, 1), (1, 2), (2, 2)")
    assert [e.id for e in part.wait(2)] == [(1, 2), (2, 2)]
    assert [e.id for e in whole.items] == [(1, 2)]


def test_by_an_extra_column_before_and_after(hub: Hub, dsn: str, db: Database) -> None:
    """When the column changes, receivers of its former and of its new value get the event once."""
    seven, eight, both = Recorder(), Recorder(), Recorder()
    db("INSERT INTO users (team_id, tag) VALUES (7, 'x')")
    hub.start(dsn, [watch("users", extra=["team_id", "tag"])])
    hub.subscribe(seven, "users", team_id=7)
    hub.subscribe(eight, "users", team_id=8)
    hub.subscribe(both, "users", team_id=8, tag="x")
    db("UPDATE users SET team_id = 8")
    assert eight.wait(1)[0].old["team_id"] == 7
    assert seven.wait(1) == eight.items == both.wait(1)


def test_a_receiver_asks_for_what_is_not_carried(hub: Hub, dsn: str) -> None:
    """A filter on a column that the events lack is refused with the fix, at the decorator."""
    hub.start(dsn, [watch("users", extra=["team_id"])])
    with pytest.raises(ReceiverError, match=r"team_ids=….*'team_id'.*extra=\['team_ids'\]"):
        hub.on("users", team_ids=1)(print)


def test_an_unhashable_filter(hub: Hub, dsn: str) -> None:
    """A filter value that cannot be looked up is refused."""
    hub.start(dsn, ["users"])
    with pytest.raises(ReceiverError, match="only values that hash"):
        hub.subscribe(print, "users", id=[1])
    assert listening(hub) == []


def test_nothing_delivers_that_at_start(hub: Hub, dsn: str) -> None:
    """start names the receiver that nothing would reach, and the nearest watcher."""

    @hub.on("users", "deleted")
    def purge(event: Any) -> None: ...

    with pytest.raises(ReceiverError, match=r"purge listens to \('users', 'deleted'\).*'inserted'"):
        hub.start(dsn, [("users", "inserted")])
    assert not hub.running


def test_nothing_delivers_that_later(hub: Hub, dsn: str) -> None:
    """After start, the decorator itself raises."""
    hub.start(dsn, ["users"])
    with pytest.raises(ReceiverError, match=r"'posts', which no watcher.*\('users'"):
        hub.on("posts")(print)
    with pytest.raises(ReceiverError, match="signal"):
        hub.signal("users", "truncated")


def test_operations_are_known(hub: Hub) -> None:
    """A misspelt operation is refused with what is near."""
    with pytest.raises(ReceiverError, match="did you mean 'updated'"):
        hub.on("users", "update")(print)


def test_only_functions_receive(hub: Hub) -> None:
    """What cannot be called is refused with the way to go."""
    with pytest.raises(ReceiverError, match="cannot be called"):
        hub.subscribe("print", "users")  # type: ignore[arg-type]


def test_blinkers_own_receivers(hub: Hub, dsn: str, db: Database) -> None:
    """signal() is a blinker signal: receivers get the model and the event, by sender if asked."""
    seen: list[Any] = []
    done = threading.Event()
    created = hub.signal("users", "inserted")

    @created.connect
    def any_sender(sender: Any, event: Any) -> None:
        seen.append((sender, event.id))

    def from_users(sender: Any, event: Any) -> None:
        seen.append(("users only", event.id))
        done.set()

    created.connect(from_users, sender="users")
    created.connect(lambda sender, event: seen.append("never"), sender="posts", weak=False)
    hub.start(dsn, ["users"])
    db("INSERT INTO users (name) VALUES ('a')")
    assert done.wait(DEADLINE)
    assert sorted(map(str, seen)) == ["('users only', 1)", "('users', 1)"]


def test_blinkers_own_receivers_beside_subscriptions(hub: Hub, dsn: str, db: Database) -> None:
    """Who connects to a signal beside subscriptions is called until it disconnects."""
    subscribed, connected = Recorder(), Recorder()
    hub.start(dsn, ["users"])
    hub.subscribe(subscribed, "users", "inserted")
    signal = hub.signal("users", "inserted")

    def receive(sender: object, event: object) -> None:
        connected(event)

    db("INSERT INTO users (name) VALUES ('a')")
    subscribed.wait(1)
    signal.connect(receive)
    db("INSERT INTO users (name) VALUES ('b')")
    [second] = connected.wait(1)
    assert subscribed.wait(2)[1] is second
    signal.disconnect(receive)
    db("INSERT INTO users (name) VALUES ('c')")
    subscribed.wait(3)
    assert connected.items == [second]


def test_a_lambda_stays(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """Receivers are held strongly, so that a lambda goes on receiving."""
    hub.start(dsn, ["users"])
    hub.subscribe(lambda event: recorder(event), "users")
    db("INSERT INTO users (name) VALUES ('a')")
    recorder.wait(1)


def test_cancel_ends_it(hub: Hub, dsn: str, db: Database) -> None:
    """A cancelled subscription is called no more, and cancelling twice is harmless."""
    gone, one_gone, stays = Recorder(), Recorder(), Recorder()
    hub.start(dsn, ["users"])
    subscriptions = [hub.subscribe(gone, "users"), hub.subscribe(one_gone, "users", id=1)]
    hub.subscribe(stays, "users")
    for subscription in [*subscriptions, *subscriptions]:
        subscription.cancel()
    db("INSERT INTO users (name) VALUES ('a')")
    stays.wait(1)
    assert gone.items == one_gone.items == []


def test_cancel_in_the_middle_of_a_statement(hub: Hub, dsn: str, db: Database) -> None:
    """A receiver that cancels itself gets no further row of the same statement."""
    stays = Recorder()
    calls: list[int] = []

    def once(event: Any) -> None:
        calls.append(event.id)
        subscription.cancel()

    hub.start(dsn, ["users"])
    subscription = hub.subscribe(once, "users")
    hub.subscribe(stays, "users")
    db("INSERT INTO users (name) SELECT 'a' FROM generate_series(1, 50)")
    stays.wait(50)
    assert calls == [1]


def test_the_schema_may_be_left_out(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """A receiver may call a watched table with or without its schema."""
    hub.start(dsn, ["public.users"])
    for name in ("users", "public.users"):
        hub.subscribe(recorder, name)
    db("INSERT INTO users (name) VALUES ('a')")
    recorder.wait(2)


def test_truncate_is_opt_in(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """truncated comes once, without an id, where it was asked for."""
    db("INSERT INTO users (name) VALUES ('a'), ('b')")
    hub.start(dsn, [("users", "truncated", "inserted")])
    hub.subscribe(recorder, "users")
    db("TRUNCATE users")
    db("INSERT INTO users (name) VALUES ('c')")
    assert [(e.op, e.id) for e in recorder.wait(2)] == [("truncated", None), ("inserted", 3)]


def test_a_value_that_was_not_asked_for(hub: Hub, dsn: str, db: Database) -> None:
    """The error names the column, what there is, and the option that brings it."""
    hub.on("users")(lambda event: event.values["name"])
    failed = Recorder()
    hub.receiver_failed.connect(lambda *_, **details: failed(details["error"]), weak=False)
    hub.start(dsn, ["users"])
    db("INSERT INTO users (name) VALUES ('a')")
    [error] = failed.wait(1)
    assert isinstance(error, KeyError)
    assert "'name' does not come with this event, which has no values" in error.args[0]
    assert "extra=['name']" in error.args[0]


def test_a_value_that_was_too_long(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """The error says that the row did not travel, though the watcher asks for the column."""
    db("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    hub.subscribe(recorder, "notes")
    hub.start(dsn, [watch("notes", extra=["body"])])
    db("INSERT INTO notes VALUES (1, repeat('x', 9000))")
    [event] = recorder.wait(1)
    with pytest.raises(KeyError, match="too long to travel"):
        event.values["body"]
