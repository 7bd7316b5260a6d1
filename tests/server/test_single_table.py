"""Single-table inheritance: rows that enter a class and leave it, and how rows are told apart."""

from __future__ import annotations

import enum
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

import pgsignals
from pgsignals import Hub, watch
from pgsignals.hub.hub import Delivery
from tests.conftest import Database, Recorder
from tests.waiting import settle


class Base(orm.DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "people"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    kind: orm.Mapped[str]
    name: orm.Mapped[str | None]


class Manager(Person):
    __mapper_args__ = {"polymorphic_identity": "manager"}  # noqa: RUF012


class Director(Manager):
    __mapper_args__ = {"polymorphic_identity": "director"}  # noqa: RUF012


class Guest(Person):
    """No row can be one."""

    __mapper_args__ = {"polymorphic_abstract": True}  # noqa: RUF012


TABLES = {
    "plain": ["CREATE TABLE people (id int PRIMARY KEY, kind text, name text)"],
    "without a key": ["CREATE TABLE people (id int, kind text, name text)"],
    "partitioned": [
        "CREATE TABLE people (id int PRIMARY KEY, kind text, name text) PARTITION BY HASH (id)",
        "CREATE TABLE people_0 PARTITION OF people FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
    ],
}


@pytest.mark.parametrize("statements", TABLES.values(), ids=TABLES)
def test_rows_that_enter_and_leave_a_class(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery, statements: list[str]
) -> None:
    """An update after which a row is, or was, of the class is an event of the class."""
    for statement in statements:
        each_db(statement)
    seen = {model: Recorder() for model in (Person, Manager, Director)}
    for model, recorder in seen.items():
        hub.on(model)(recorder)
    hub.start(each_dsn, list(seen), delivery=delivery)
    each_db("INSERT INTO people VALUES (1, 'person'), (2, 'person')")
    for kind in ("manager", "director", "manager", "person", None, "director"):
        each_db("UPDATE people SET kind = %s WHERE id = 1", (kind,))
    each_db("UPDATE people SET name = 'x'")
    each_db("DELETE FROM people")
    assert [(event.op, event.id) for event in seen[Manager].wait(7)] == [
        *[("updated", 1)] * 6,
        ("deleted", 1),
    ]
    assert [event.op for event in seen[Director].wait(5)] == [*["updated"] * 4, "deleted"]
    assert [event.op for event in seen[Person].wait(12)] == [
        *["inserted"] * 2,
        *["updated"] * 8,
        *["deleted"] * 2,
    ]
    settle(hub)
    assert [len(recorder.items) for recorder in seen.values()] == [12, 7, 5]


def test_what_else_a_watcher_asks_for(
    hub: Hub, each_dsn: str, each_db: Database, delivery: Delivery
) -> None:
    """Columns and conditions narrow such updates too; old and new values select receivers."""
    each_db(TABLES["plain"][0])
    all_of_them, former, later = Recorder(), Recorder(), Recorder()
    columns, arrived = Recorder(), Recorder()
    hub.on(Manager)(all_of_them)
    hub.on(Manager, name="ann")(former)
    hub.on(Manager, name="bob")(later)
    hub.on("renamed")(columns)
    hub.on("arrived")(arrived)
    hub.start(
        each_dsn,
        [
            watch(Manager, extra=["name", "kind"]),
            watch(Manager, "updated", columns=["name"], label="renamed"),
            watch(Manager, "updated", when="NEW.kind = 'manager'", label="arrived"),
        ],
        delivery=delivery,
    )
    each_db("INSERT INTO people VALUES (1, 'manager', 'ann')")
    each_db("UPDATE people SET kind = 'person', name = 'bob'")
    each_db("UPDATE people SET name = 'eve'")
    each_db("UPDATE people SET kind = 'manager'")
    each_db("UPDATE people SET kind = 'person'")
    _, left, came, _ = all_of_them.wait(4)
    assert (left.old, left.values) == (
        {"name": "ann", "kind": "manager"},
        {"name": "bob", "kind": "person"},
    )
    assert left.changed == {"name", "kind"}
    assert (came.op, came.changed) == ("updated", {"kind"})
    settle(hub)
    assert [event.uid for event in former.items] == [e.uid for e in all_of_them.items[:2]]
    assert [event.uid for event in later.items] == [left.uid]
    assert [event.changed for event in columns.items] == [{"name"}]
    assert [event.id for event in arrived.items] == [1]
    assert len(all_of_them.items) == 4


def test_a_row_that_left_is_not_loaded(
    hub: Hub, each_dsn: str, each_db: Database, recorder: Recorder
) -> None:
    """It is None, or left out of a batch, through a session that had it, and a connection."""
    each_db(TABLES["plain"][0])
    each_db("INSERT INTO people VALUES (1, 'manager', 'ann'), (2, 'manager', 'bob')")
    batches = Recorder()
    hub.on(Manager)(recorder)
    hub.on_batch(Manager, every=3600, max_size=2)(batches)
    hub.start(each_dsn, [Manager])
    engine = sa.create_engine(each_dsn.replace("postgresql:", "postgresql+psycopg2:"))
    with orm.Session(engine) as session:
        assert len(session.scalars(sa.select(Manager)).all()) == 2
        session.rollback()
        each_db("UPDATE people SET kind = CASE id WHEN 1 THEN 'person' ELSE 'director' END")
        left, stayed = recorder.wait(2)
        assert left.load(session) is None
        assert stayed.load(session).kind == "director"
        assert left.load(session.connection()) is None
        assert stayed.load(session.connection())["kind"] == "director"
        [batch] = batches.wait(1)
        assert batch.ids == [1, 2]
        assert [person.id for person in batch.load(session)] == [2]
    engine.dispose()


class Word(str, enum.Enum):
    YES = "yes"


class Number(int, enum.Enum):
    YES = 7


@pytest.mark.parametrize(
    ("column", "of_class", "other", "type_", "identity"),
    [
        ("int", "7", "8", sa.Integer(), 7),
        ("int", "7", "8", sa.Integer(), Number.YES),
        ("bool", "true", "false", sa.Boolean(), True),
        ("char(8)", "'yes'", "'no'", sa.CHAR(8), "yes"),
        ("numeric(6, 2)", "7", "8", sa.Numeric(6, 2), Decimal(7)),
        ("float8", "7", "7.5", sa.Float(), 7.0),
        ("text", "'yes'", "'no'", sa.String(), Word.YES),
        ("varchar(9)", "'YES'", "'yes'", sa.Enum(Word, native_enum=False), Word.YES),
        ("answer", "'YES'", "'NO'", sa.Enum(Word, name="answer"), Word.YES),
        ("answer", "'NO'", "'YES'", sa.String(), "NO"),
        ("agreed", "true", "false", sa.Boolean(), True),
    ],
)
def test_discriminators_that_are_no_text(
    hub: Hub,
    each_dsn: str,
    each_db: Database,
    recorder: Recorder,
    column: str,
    of_class: str,
    other: str,
    type_: Any,
    identity: object,
) -> None:
    """Rows belong to a class by the values that SQLAlchemy writes, whatever their type's texts."""
    base = orm.declarative_base()

    class Thing(base):  # type: ignore[misc, valid-type]
        __tablename__ = "things"
        __mapper_args__ = {"polymorphic_on": "kind"}  # noqa: RUF012
        id = sa.Column(sa.Integer, primary_key=True)
        kind = sa.Column(type_)

    class Own(Thing):
        __mapper_args__ = {"polymorphic_identity": identity}  # noqa: RUF012

    each_db("CREATE TYPE answer AS ENUM ('YES', 'NO')")
    each_db("CREATE DOMAIN agreed AS bool")
    each_db(f"CREATE TABLE things (id int PRIMARY KEY, kind {column})")
    hub.on(Own)(recorder)
    hub.start(each_dsn, [Own])
    each_db(f"INSERT INTO things VALUES (1, {of_class}), (2, {other}), (3, NULL)")
    each_db(f"UPDATE things SET kind = {other}")
    each_db(f"UPDATE things SET kind = {of_class} WHERE id = 3")
    each_db("DELETE FROM things")
    assert [(event.op, event.id) for event in recorder.wait(4)] == [
        ("inserted", 1),
        ("updated", 1),
        ("updated", 3),
        ("deleted", 3),
    ]
    settle(hub)
    assert len(recorder.items) == 4


def test_an_identity_that_the_enum_lacks(
    hub: Hub, dsn: str, db: Database, recorder: Recorder
) -> None:
    """Until a migration has added the label, no row is of the class, and nothing is broken."""
    db("CREATE TYPE kind AS ENUM ('person')")
    db("CREATE TABLE people (id int PRIMARY KEY, kind kind, name text)")
    gaps = Recorder()
    hub.on_gap(gaps)
    hub.on(Manager)(recorder)
    hub.start(dsn, [Manager])
    db("INSERT INTO people VALUES (1, 'person')")
    db("ALTER TYPE kind ADD VALUE 'manager'")
    db("UPDATE people SET kind = 'manager'")
    assert [event.op for event in recorder.wait(1)] == ["updated"]
    assert not gaps.items


def test_a_class_that_no_row_is_of(hub: Hub, dsn: str, db: Database) -> None:
    """A class without an identity, nor subclasses that have one, cannot be watched."""
    db(TABLES["plain"][0])
    with pytest.raises(pgsignals.ModelError, match=r"No row is one of Guest.*parent Person"):
        hub.start(dsn, [Guest])


def test_models_of_one_table_keep_their_former_definitions_apart(
    each_dsn: str, each_db: Database
) -> None:
    """What one model's former trigger wrote is delivered to that model, once."""
    each_db(TABLES["plain"][0])
    seen = {model: Recorder() for model in (Person, Manager)}

    def started(*watchers: object) -> Hub:
        hub = Hub()
        for model, recorder in seen.items():
            hub.on(model, "inserted")(recorder)
        return hub.start(each_dsn, watchers, delivery="outbox", name="mailer")

    started(Person, Manager).stop()
    each_db("INSERT INTO people VALUES (1, 'manager'), (2, 'person')")
    with started(watch(Person, extra=["name"]), watch(Manager, extra=["kind"])) as hub:
        each_db("INSERT INTO people VALUES (3, 'manager'), (4, 'person')")
        settle(hub)
        assert [event.id for event in seen[Manager].wait(2)] == [1, 3]
        assert [event.id for event in seen[Person].wait(4)] == [1, 2, 3, 4]
        settle(hub)
    assert [len(recorder.items) for recorder in seen.values()] == [4, 2]


def test_a_model_and_its_tables_name(
    hub: Hub, dsn: str, db: Database, delivery: Delivery, recorder: Recorder
) -> None:
    """Watchers of a table by its model and by its name both deliver; the name hears of both."""
    db(TABLES["plain"][0])
    by_name = Recorder()
    hub.on(Person)(recorder)
    hub.on("people")(by_name)
    hub.start(dsn, [Person, watch("people", extra=["name"])], delivery=delivery)
    db("INSERT INTO people VALUES (1, 'person', 'ann')")
    db("UPDATE people SET name = 'eve'")
    assert [event.op for event in recorder.wait(2)] == ["inserted", "updated"]
    with_names = [event for event in by_name.wait(4) if event.values]
    assert [event.op for event in with_names] == ["inserted", "updated"]
