"""Names of any characters, wherever a name is given, through to a received event."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg2 import sql

from pgsignals import Hub, watch
from pgsignals.hub.hub import Delivery
from pgsignals.testing import Server
from tests.conftest import Database, Recorder

NASTY = [
    '"; DROP TABLE x; --',
    "a.b",
    " ",
    "%s %(x)s %%",
    "{} {0} {select}",
    "'",
    "\\",
    "\\n",
    "$pgsignals$",
    "select",
    "é" * 31 + "x",
    "😀" * 15,
    "\n\t\x01",
    "new",
    "OLD",
    "pgs_lines",
    "id",
    "--",
    "/*",
    ":x",
]


def fits(name: str) -> bool:
    """Whether PostgreSQL takes it as it is, and for a schema and a column too."""
    system = ("tableoid", "ctid", "xmin", "xmax", "cmin", "cmax", "oid")
    return len(name.encode()) <= 63 and not name.startswith("pg_") and name not in system


CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
NAMES = (
    st.sampled_from(NASTY)
    | st.text(st.sampled_from("\"'.%{}$\\ ;-:/*aA"), min_size=1, max_size=63)
    | st.text(CHARACTERS, min_size=1, max_size=63)
).filter(fits)
TEXTS = st.text(CHARACTERS, min_size=1, max_size=80)


@pytest.fixture(scope="module", params=get_args(Delivery))
def place(server: Server, request: pytest.FixtureRequest) -> Iterator[tuple[Database, Delivery]]:
    """One database for all examples of each delivery."""
    made = Database(server.create_database())
    yield made, request.param
    made.connection.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    schema=NAMES,
    table=NAMES,
    columns=st.lists(NAMES, min_size=3, max_size=3, unique=True),
    label=st.sampled_from(NASTY) | TEXTS,
    namespace=st.sampled_from(NASTY) | TEXTS,
)
@example('"; DROP TABLE x; --', "a.b", ["pgs_n", "%s", "'"], "%(x)s", "{channel}")
@example("x" * 63, "y" * 63, ["a" * 63, "b" * 63, "c" * 63], "l" * 200, "n" * 200)
@example("new", "old", ["new", "old", "NEW"], "deleted", "default")
def test_any_identifiers(
    place: tuple[Database, Delivery],
    schema: str,
    table: str,
    columns: list[str],
    label: str,
    namespace: str,
) -> None:
    """Schema, table, key, column, label and namespace of any characters give exact events."""
    (db, delivery), (key, watched, other) = place, columns
    name = sql.Identifier(schema, table)
    k, w, o = map(sql.Identifier, columns)
    model = ".".join('"' + name.replace('"', '""') + '"' for name in (schema, table))
    db(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))
    db(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    try:
        db(sql.SQL("CREATE TABLE {} ({} int PRIMARY KEY, {} text, {} text)").format(name, k, w, o))
        recorder = Recorder()
        watchers = [
            watch(
                model,
                "updated",
                columns=[watched],
                extra=[other],
                when=sql.SQL("NEW.{0} = OLD.{0}").format(o).as_string(db.connection),
                label=label,
            ),
            watch(model, extra=[watched]),
        ]
        with Hub().start(db.dsn, watchers, namespace=namespace, delivery=delivery) as hub:
            hub.subscribe(recorder, label)
            hub.subscribe(recorder, model)
            hub.subscribe(recorder, model, "updated", **{key: 2})
            db(sql.SQL("INSERT INTO {} VALUES (1, 'a', 'b')").format(name))
            db(sql.SQL("UPDATE {} SET {} = 2, {} = 'c'").format(name, k, w))
            db(sql.SQL("DELETE FROM {}").format(name))
            events = recorder.wait(5)
            states = hub.status().watchers
        Hub().start(
            db.dsn, watchers, namespace=namespace, delivery=delivery, install="check"
        ).stop()
        inserted, *updates, deleted = events
        labelled = [event for event in updates if event.label is not None]
        assert {(e.schema, e.table, e.model) for e in events} == {(schema, table, model)}
        assert (inserted.op, inserted.key, inserted.values) == (
            "inserted",
            {key: 1},
            {watched: "a"},
        )
        assert [(e.label, e.key, e.values, e.old, e.changed) for e in labelled] == [
            (
                label,
                {key: 2},
                {watched: "c", other: "b"},
                {key: 1, watched: "a", other: "b"},
                {key, watched},
            )
        ]
        assert len(updates) == 3
        assert (deleted.op, deleted.key, deleted.values) == ("deleted", {key: 2}, {watched: "c"})
        assert {state.status for state in states} == {"INSTALLED"}
    finally:
        db(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))


@pytest.mark.parametrize("name", NASTY)
def test_partitioned_tables_of_any_name(
    hub: Hub, db: Database, name: str, delivery: Delivery
) -> None:
    """Row triggers quote like statement triggers."""
    place = sql.Identifier(name)
    db(sql.SQL("CREATE TABLE {0} ({0} int PRIMARY KEY) PARTITION BY HASH ({0})").format(place))
    db(
        sql.SQL(
            "CREATE TABLE part PARTITION OF {} FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
        ).format(place)
    )
    model = '"' + name.replace('"', '""') + '"'
    recorder = Recorder()
    hub.start(db.dsn, [watch(model, extra=[name], replicated=True)], delivery=delivery)
    hub.subscribe(recorder, model)
    db(sql.SQL("INSERT INTO {} VALUES (1)").format(place))
    db(sql.SQL("UPDATE {0} SET {0} = 2").format(place))
    inserted, updated = recorder.wait(2)
    assert (inserted.key, inserted.values) == ({name: 1}, {name: 1})
    assert (updated.key, updated.old) == ({name: 2}, {name: 1})
