"""Anybody may NOTIFY on our channels: nothing there ends the thread or misleads a receiver."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psycopg2.sql import SQL, Identifier, Literal

from pgsignals import Hub, watch
from pgsignals.testing import Server
from tests.conftest import Database, Recorder
from tests.sources import source_session, source_thread

EXAMPLES, EACH = 500, 20
LONGEST = 7999

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
numbers = st.integers(-5, 5) | st.integers(-(1 << 70), 1 << 70)
escapes = st.sampled_from([r"\ud800", r"\udfff\ud800", r"\u0000", r"\uZZZZ", r"\x", "\\"])
scalars = st.none() | st.booleans() | numbers | st.floats() | text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
json_texts = st.builds(lambda value: json.dumps(value, ensure_ascii=False), values)

headers = st.fixed_dictionaries(
    {"v": st.just(1) | scalars, "x": numbers, "s": numbers, "t": numbers},
    optional={
        "c": values | st.just('{"user": ' + "[" * 3000),
        "moved": st.booleans() | scalars,
        "cut": st.booleans() | scalars,
        "part": st.tuples(st.integers(-1, 3), st.integers(-1, 3)) | values,
        "error": text | values,
        "model": text,
    },
)
# A header of the right form reaches what is behind it.
sound = st.builds(
    lambda moved, cut: {"v": 1, "x": 1, "s": 1, "t": 1, "moved": moved, "cut": cut},
    st.booleans(),
    st.booleans(),
)
lines = st.lists(json_texts | escapes.map(lambda escape: f'[1,"{escape}"]') | text, max_size=4).map(
    "\n".join
)
forged = st.builds(lambda header, body: json.dumps(header) + "\n" + body, headers | sound, lines)
huge = st.builds(
    lambda opening, unit: (opening + unit * LONGEST)[:LONGEST],
    st.sampled_from(["", '{"v":1,"x":1,"s":1,"t":1}\n', '{"v":']),
    st.sampled_from(["[", '{"a":', "9", "x", '"', "1\n", "\t", "-"]),
)
edits = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 12), text | escapes), min_size=1, max_size=4
)


def edited(valid: str, changes: list[tuple[int, int, str]]) -> str:
    """A payload with pieces cut out and others put in."""
    for at, length, piece in changes:
        start = at % (len(valid) + 1)
        valid = valid[:start] + piece + valid[start + length :]
    return valid


def payloads(valid: list[str]) -> st.SearchStrategy[str]:
    """Whatever an attacker who has seen valid payloads may send."""
    return st.one_of(
        st.builds(edited, st.sampled_from(valid), edits),
        forged,
        text,
        huge,
        st.sampled_from(valid).map(lambda each: each.replace('"v":1', '"v":2')),
    ).filter(lambda payload: len(payload.encode()) <= LONGEST)


def stranger(server: Server, dsn: str, connect: Callable[[str], Database]) -> Database:
    """A connection as a role that owns nothing and is granted nothing."""
    name = f"stranger_{secrets.token_hex(4)}"
    connect(dsn)(SQL("CREATE ROLE {} LOGIN").format(Identifier(name)))
    return connect(server.dsn(dsn.rpartition("/")[2], name))


def channels(hub: Hub) -> list[str]:
    """The channels that the Hub listens to, which go by the names of its triggers."""
    return sorted(state.name for state in hub.status().watchers)


def captured(db: Database, names: list[str], writes: list[str]) -> list[str]:
    """What the triggers send for the writes."""
    for name in names:
        db(SQL("LISTEN {}").format(Identifier(name)))
    for write in writes:
        db(write)
    db("SELECT")
    return [notify.payload for notify in db.connection.notifies]


def test_payloads_of_a_stranger(
    hub: Hub, server: Server, dsn: str, db: Database, connect: Callable[[str], Database]
) -> None:
    """10,000 random and mutated payloads by another role: counted, and ignored if not sound.

    The thread lives on in the same session. Whatever passes for an event is of the watcher whose
    channel it came by, can be read in full, and fails no receiver; a real one still arrives.
    """
    db("CREATE TABLE items (id bigserial PRIMARY KEY, name text, at timestamptz)")
    seen, failures, gaps = Recorder(), Recorder(), Recorder()
    expected = {
        *(("items", op, None) for op in ("inserted", "updated", "deleted")),
        ("items", "updated", "renamed"),
    }

    def read(event: Any) -> None:
        assert (event.model, event.op, event.label) in expected
        assert (event.schema, event.table) == ("public", "items")
        assert type(event.id) in (int, type(None))
        assert event.at.tzinfo is not None
        assert event == event
        assert repr(event)
        assert event.to_dict()
        hash(event)
        seen(event)

    hub.receiver_failed.connect(lambda hub, **failure: failures(failure), weak=False)
    hub.on_gap(gaps)
    hub.start(
        dsn,
        ["items", watch("items", "updated", extra=["name", "at"], label="renamed")],
        queue_size=1_000_000,
    )
    hub.subscribe(read, "items")
    hub.subscribe(read, "renamed")
    names, session, thread = channels(hub), source_session(db), source_thread()
    valid = captured(
        connect(dsn),
        names,
        [
            "INSERT INTO items (name, at) VALUES ('a', now()), ('b', NULL)",
            "UPDATE items SET name = 'c' WHERE id = 1",
            "UPDATE items SET id = 9, name = 'moved' WHERE id = 1",
            "DELETE FROM items",
        ],
    )
    attacker = stranger(server, dsn, connect)
    sent = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(payloads(valid), min_size=EACH, max_size=EACH, unique=True), st.data())
    def attack(batch: list[str], data: Any) -> None:
        nonlocal sent
        channel = data.draw(st.sampled_from(names))
        attacker("SELECT pg_notify(%s, payload) FROM unnest(%s) AS payload", (channel, batch))
        sent += len(batch)

    attack()
    assert sent >= EXAMPLES * EACH
    db("INSERT INTO items (id, name) VALUES (424242, 'real')")
    last = seen.wait_until(lambda event: event.id == 424242 and event.table == "items")[-1]
    assert last.op == "inserted"
    assert failures.items == []
    status = hub.status()
    assert sent / 2 < status.invalid < sent
    assert (source_session(db), source_thread(), status.reconnects) == (session, thread, 0)
    assert {gap.reason for gap in gaps.items} <= {"watcher_broken"}


def in_encoding(server: Server, encoding: str) -> str:
    """A fresh database of that encoding."""
    name = f"db_{secrets.token_hex(6)}"
    admin = Database(server.dsn())
    admin(
        SQL("CREATE DATABASE {} ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0").format(
            Identifier(name), Literal(encoding)
        )
    )
    admin.connection.close()
    return server.dsn(name)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_bytes_that_are_not_utf8(
    encoding: str, hub: Hub, server: Server, connect: Callable[[str], Database], recorder: Recorder
) -> None:
    """Where the database does not keep to UTF-8, such payloads and values end no session."""
    dsn = in_encoding(server, encoding)
    db = connect(dsn)
    db("CREATE TABLE items (id text PRIMARY KEY)")
    hub.subscribe(recorder, "items")
    hub.on_gap(recorder)
    hub.start(dsn, [("items", "inserted")])
    [channel] = channels(hub)
    # Bytes that are LATIN1 and not UTF-8; the client's encoding would refuse or convert them.
    odd = SQL("convert_from('\\xe4f6fc', {})").format(Literal(encoding))
    db(
        SQL("SELECT pg_notify({}, {}), pg_notify({}, 'foreign')").format(
            Literal(channel), odd, Literal(channel)
        )
    )
    db(SQL("INSERT INTO items VALUES ({})").format(odd))
    db("INSERT INTO items VALUES ('plain')")
    first, second = recorder.wait(2)
    assert first.id == ("äöü" if encoding == "LATIN1" else "\ufffd\ufffd\ufffd")
    assert second.id == "plain"
    assert hub.status().invalid == 2
    assert hub.status().reconnects == 0


def test_text_that_is_utf8_without_saying_so(
    hub: Hub, server: Server, connect: Callable[[str], Database], recorder: Recorder
) -> None:
    """A database without an encoding that holds UTF-8 gives it back."""
    dsn = in_encoding(server, "SQL_ASCII")
    db = connect(dsn)
    db("CREATE TABLE items (id text PRIMARY KEY, tags text[])")
    hub.start(dsn, [watch("items", "inserted", extra=["tags"])])
    hub.subscribe(recorder, "items")
    db.connection.set_client_encoding("UTF8")
    db("INSERT INTO items VALUES ('ключ ✓', ARRAY['да', 'ä'])")
    [event] = recorder.wait(1)
    assert (event.id, event.values) == ("ключ ✓", {"tags": ["да", "ä"]})
