"""From each kind of model through the database to a receiver, and back to the record."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import django
import django.conf
import django.db
import flask
import flask_sqlalchemy
import pytest
import sqlalchemy as sa
import sqlmodel
from django.db import models
from sqlalchemy import orm

import pgsignals
from pgsignals import Hub, Table, TableRef, watch
from tests.conftest import Database, Recorder
from tests.connections import django_connection


class Base(orm.DeclarativeBase):
    pass


class User(Base):
    """No attribute is called like its column."""

    __tablename__ = "Users %"
    id: orm.Mapped[int] = orm.mapped_column("user id", primary_key=True)
    email: orm.Mapped[str] = orm.mapped_column("e:mail")
    team: orm.Mapped[int | None] = orm.mapped_column("id")


class Employee(Base):
    """Joined inheritance from here to Manager."""

    __tablename__ = "employees"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}  # noqa: RUF012
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    kind: orm.Mapped[str]
    name: orm.Mapped[str]


class Manager(Employee):
    __tablename__ = "managers"
    __mapper_args__ = {"polymorphic_identity": "manager"}  # noqa: RUF012
    id: orm.Mapped[int] = orm.mapped_column(
        "employee_id", sa.ForeignKey(Employee.id), primary_key=True
    )
    budget: orm.Mapped[int] = orm.mapped_column("budget_eur")


class Vehicle(Base):
    """Single-table inheritance from here on."""

    __tablename__ = "vehicles"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "vehicle"}  # noqa: RUF012
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    kind: orm.Mapped[str] = orm.mapped_column("vehicle_kind")


class Car(Vehicle):
    __mapper_args__ = {"polymorphic_identity": "car"}  # noqa: RUF012
    doors: orm.Mapped[int | None] = orm.mapped_column("door_count")


class Taxi(Car):
    __mapper_args__ = {"polymorphic_identity": "it's a taxi"}  # noqa: RUF012


prices = sa.Table(
    "prices",
    sa.MetaData(),
    sa.Column("from day", sa.Date, primary_key=True, key="day"),
    sa.Column("item no", sa.Integer, primary_key=True, key="item"),
    sa.Column("amount", sa.Numeric),
    schema="the shop",
)


class Pilot(sqlmodel.SQLModel, table=True):
    metadata = sa.MetaData()
    id: UUID = sqlmodel.Field(primary_key=True)
    name: str


if not django.conf.settings.configured:
    django.conf.settings.configure()
django.setup()


class Place(models.Model):
    name = models.TextField(db_column="Place Name")
    owner = models.ForeignKey("self", models.CASCADE, null=True, db_column="OWNER")

    class Meta:
        app_label = "end_to_end"
        db_table = '"geo"."place"'


class Cafe(Place):
    stars = models.IntegerField()

    class Meta:
        app_label = "end_to_end"


@pytest.fixture
def engine(dsn: str) -> Iterator[sa.Engine]:
    """All of SQLAlchemy's tables, created."""
    engine = sa.create_engine(dsn.replace("postgresql:", "postgresql+psycopg2:"))
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("the shop"))
        for metadata in (Base.metadata, prices.metadata, Pilot.metadata):
            metadata.create_all(connection)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: sa.Engine) -> Iterator[orm.Session]:
    """A session that commits what a test adds."""
    with orm.Session(engine) as session:
        yield session


def test_attributes_are_what_users_write_and_receivers_get(
    hub: Hub, dsn: str, session: orm.Session, recorder: Recorder
) -> None:
    """Options, filters, key, values and changes go by attribute names throughout."""
    hub.on(User, team=3)(recorder)
    hub.start(dsn, [watch(User, "updated", columns=["email"], extra=["team"])])
    user = User(id=1, email="a@example.org", team=3)
    session.add(user)
    session.commit()
    user.email = "b@example.org"
    session.commit()
    [event] = recorder.wait(1)
    assert event.model is User
    assert (event.id, event.key) == (1, {"id": 1})
    assert event.values == {"email": "b@example.org", "team": 3}
    assert event.old == {"email": "a@example.org", "team": 3}
    assert event.changed == {"email"}
    assert event.load(session) is user
    with pytest.raises(pgsignals.TableError, match=r"no column 'e:mail'.*id, email, team"):
        Hub().start(dsn, [watch(User, extra=["e:mail"])])


def test_an_attribute_may_be_called_like_another_column(
    hub: Hub, dsn: str, session: orm.Session, recorder: Recorder
) -> None:
    """``id`` is the attribute, not the column of that name, which belongs to ``team``."""
    hub.on(User, "inserted", id=7)(recorder)
    hub.start(dsn, [watch(User, "inserted", extra=["id", "team"])])
    session.add_all([User(id=8, email="a", team=7), User(id=7, email="b", team=8)])
    session.commit()
    [event] = recorder.wait(1)
    assert (event.id, event.values) == (7, {"id": 7, "team": 8})


def test_joined_inheritance_is_a_table_for_each_class(
    hub: Hub, dsn: str, session: orm.Session
) -> None:
    """A subclass's own columns are its events; those of the parent are the parent's."""
    managers, employees = Recorder(), Recorder()
    hub.on(Manager)(managers)
    hub.on(Employee)(employees)
    hub.start(dsn, [watch(Manager, extra=["budget"]), watch(Employee, extra=["name"])])
    manager = Manager(id=1, name="Ann", budget=9)
    session.add_all([manager, Employee(id=2, name="Bob")])
    session.commit()
    [born] = managers.wait(1)
    assert (born.table, born.id, born.values) == ("managers", 1, {"budget": 9})
    assert born.load(session) is manager
    assert {event.values["name"] for event in employees.wait(2)} == {"Ann", "Bob"}
    manager.name = "Eve"
    session.commit()
    assert employees.wait(3)[2].changed == {"name"}
    manager.budget = 10
    session.commit()
    assert managers.wait(2)[1].old == {"budget": 9}
    with pytest.raises(pgsignals.TableError, match=r"'name' is not a column of public\.managers: "):
        Hub().start(dsn, [watch(Manager, extra=["name"])])


def test_single_table_inheritance_is_the_classes_own_rows(
    hub: Hub, dsn: str, session: orm.Session
) -> None:
    """A subclass gets its rows and those of its subclasses; the base gets all."""
    seen = {model: Recorder() for model in (Vehicle, Car, Taxi)}
    for model, recorder in seen.items():
        hub.on(model)(recorder)
    hub.start(dsn, [Vehicle, watch(Car, extra=["doors"]), Taxi])
    car, taxi = Car(id=2, doors=4), Taxi(id=3, doors=5)
    session.add_all([Vehicle(id=1), car, taxi])
    session.commit()
    car.doors = 3
    session.commit()
    for each in session.scalars(sa.select(Vehicle)):
        session.delete(each)
    session.commit()
    assert sorted(event.id for event in seen[Taxi].wait(2)) == [3, 3]
    cars = seen[Car].wait(5)
    assert [event.values["doors"] for event in cars if event.op == "updated"] == [3]
    assert sorted(event.id for event in cars) == [2, 2, 2, 3, 3]
    assert sorted(event.id for event in seen[Vehicle].wait(7)) == [1, 1, 2, 2, 2, 3, 3]
    assert {event.model for event in cars} == {Car}


def test_a_table_with_keys_for_its_columns(
    hub: Hub, dsn: str, engine: sa.Engine, recorder: Recorder
) -> None:
    """An ``sqlalchemy.Table`` goes by its columns' keys; a composite key is a tuple."""
    hub.on(prices, item=5)(recorder)
    hub.start(dsn, [watch(prices, "inserted", "updated", extra=["amount"])])
    with engine.begin() as connection:
        for item in (4, 5):
            connection.execute(
                prices.insert().values(day=sa.func.current_date(), item=item, amount=item)
            )
    [event] = recorder.wait(1)
    assert (event.schema, event.table) == ("the shop", "prices")
    assert event.id == (event.key["day"], 5)
    with engine.connect() as connection:
        assert event.load(connection) == {**event.key, **event.values}


def test_sqlmodel(hub: Hub, dsn: str, engine: sa.Engine, recorder: Recorder) -> None:
    """An SQLModel is watched by its class; its UUID key is a UUID."""
    number = UUID(int=7)
    hub.on(Pilot, "inserted", id=number)(recorder)
    hub.start(dsn, [watch(Pilot, extra=["name"])])
    with sqlmodel.Session(engine) as session:
        session.add(Pilot(id=number, name="Ada"))
        session.commit()
        [event] = recorder.wait(1)
        assert (event.id, event.values) == (number, {"name": "Ada"})
        assert event.load(session).name == "Ada"


def test_flask_sqlalchemy(hub: Hub, dsn: str, recorder: Recorder) -> None:
    """A Flask-SQLAlchemy model is watched by its class and loaded by ``db.session``."""
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = dsn.replace("postgresql:", "postgresql+psycopg2:")
    db = flask_sqlalchemy.SQLAlchemy(app)

    class Post(db.Model):  # type: ignore[misc, name-defined]
        id = db.Column(db.Integer, primary_key=True)
        title = db.Column("post_title", db.Text)

    hub.on(Post)(recorder)
    with app.app_context():
        db.create_all()
        # The address in SQLAlchemy's form works, too.
        hub.start(app.config["SQLALCHEMY_DATABASE_URI"], [watch(Post, extra=["title"])])
        db.session.add(Post(title="Hello"))
        db.session.commit()
        [event] = recorder.wait(1)
        assert event.values == {"title": "Hello"}
        assert event.load(db.session).title == "Hello"
        db.session.remove()
        db.engine.dispose()


def test_django(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """A Django model goes by its fields, in a schema written into ``db_table``, and loads."""
    db("CREATE SCHEMA geo")
    cafes = Recorder()
    hub.on(Place, owner_id=1)(recorder)
    hub.on(Cafe)(cafes)
    with django_connection(dsn) as connection:
        with connection.schema_editor() as editor:
            editor.create_model(Place)
            editor.create_model(Cafe)
        hub.start(
            dsn,
            [
                watch(Place, "inserted", "updated", extra=["name", "owner"]),
                watch(Cafe, extra=["stars"]),
            ],
        )
        home = Place.objects.create(name="home")
        shed = Place.objects.create(name="shed", owner=home)
        Place.objects.filter(pk=shed.pk).update(name="barn")
        born, changed = recorder.wait(2)
        assert (born.schema, born.table) == ("geo", "place")
        assert (born.id, born.values) == (2, {"name": "shed", "owner_id": 1})
        assert (changed.old["name"], changed.changed) == ("shed", {"name"})
        assert changed.load().name == "barn"
        assert changed.load(Place.objects.select_related("owner")).owner == home

        cafe = Cafe.objects.create(name="corner", stars=5)
        [born] = cafes.wait(1)
        assert (born.id, born.values) == (cafe.pk, {"stars": 5})
        assert born.load() == cafe
        with pytest.raises(pgsignals.TableError, match=r"it lives in the table .*geo.*place"):
            Hub().start(dsn, [watch(Cafe, extra=["name"])])


@pytest.mark.parametrize(
    ("given", "schema", "table"),
    [
        ("orders", "public", "orders"),
        ("public.orders", "public", "orders"),
        ('"orders"', "public", "orders"),
        ("Orders", "public", "Orders"),
        ("shop.orders", "shop", "orders"),
        ('shop."my.orders"', "shop", "my.orders"),
        ('"My ""Schema"""."Order %s"', 'My "Schema"', "Order %s"),
    ],
)
def test_names(
    hub: Hub, dsn: str, db: Database, recorder: Recorder, given: str, schema: str, table: str
) -> None:
    """A text names a table, letter for letter; dots and quotes go between double quotes."""
    quoted = ".".join('"' + part.replace('"', '""') + '"' for part in (schema, table))
    db('CREATE SCHEMA shop; CREATE SCHEMA "My ""Schema"""')
    db(f"CREATE TABLE {quoted} (id serial PRIMARY KEY)")
    hub.on(given)(recorder)
    hub.start(dsn, [given])
    db(f"INSERT INTO {quoted} DEFAULT VALUES")
    [event] = recorder.wait(1)
    assert (event.model, event.schema, event.table) == (given, schema, table)
    assert event.load(db.connection) == {"id": 1}


def test_a_bare_name_is_looked_up_through_the_search_path(
    hub: Hub, dsn: str, db: Database, recorder: Recorder
) -> None:
    """The DSN's search path decides which of two tables is meant, not the writer's."""
    db("CREATE TABLE orders (id int PRIMARY KEY)")
    db("CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY)")
    hub.on("orders")(recorder)
    hub.start(f"{dsn}?options=-csearch_path%3Dshop,public", ["orders"])
    db("INSERT INTO public.orders VALUES (1); INSERT INTO shop.orders VALUES (2)")
    assert (recorder.wait(1)[0].id, recorder.items[0].schema) == (2, "shop")


# ---- resolvers of others ----


@dataclass(frozen=True)
class Entity:
    """A model of a framework that pgsignals does not know."""

    table: str
    fields: tuple[tuple[str, str], ...] = ()


class EntityResolver:
    """What the author of that framework would write."""

    name = "entities"

    def resolve(self, model: object) -> TableRef | None:
        if not isinstance(model, Entity):
            return None
        return TableRef(model.table, attributes=dict(model.fields))

    def load(
        self, model: object, table: Table, session: object, ids: Sequence[tuple[object, ...]]
    ) -> list[Any] | None:
        return [(model, id_) for id_ in ids] if session == "an entity session" else None


@pytest.fixture
def entity(db: Database) -> Entity:
    """A model of that kind, whose table exists."""
    db("CREATE TABLE things (id serial PRIMARY KEY, thing_name text)")
    return Entity("things", (("name", "thing_name"),))


def test_a_resolver_given_to_start(
    hub: Hub, dsn: str, db: Database, entity: Entity, recorder: Recorder
) -> None:
    """It is asked for tables, attributes and records of its models."""
    hub.on(entity)(recorder)
    hub.start(dsn, [watch(entity, "inserted", extra=["name"])], resolvers=[EntityResolver()])
    db("INSERT INTO things (thing_name) VALUES ('a')")
    [event] = recorder.wait(1)
    assert (event.model, event.values) == (entity, {"name": "a"})
    assert event.load("an entity session") == (entity, (1,))
    with pytest.raises(pgsignals.ConfigurationError, match="cannot use int"):
        event.load(7)
    assert [state.status for state in hub.status().watchers] == ["INSTALLED"]


def test_without_its_resolver_a_model_is_unknown(hub: Hub, dsn: str, entity: Entity) -> None:
    """The error says what can be watched and which resolvers there are."""
    with pytest.raises(pgsignals.ModelError, match=r"Entity\(.*resolvers present: sqlalchemy, dja"):
        hub.start(dsn, [entity])


PLUGIN = f"""
import pgsignals
from {__name__} import EntityResolver

@pgsignals.hookimpl
def pgsignals_resolver():
    return EntityResolver()
"""


@pytest.fixture
def installed_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two installed distributions with plugins, of which one cannot be imported."""
    for name, code in (("entity", PLUGIN), ("broken", "import there_is_no_such_module")):
        (tmp_path / f"pgsignals_{name}_plugin.py").write_text(code)
        info = tmp_path / f"pgsignals_{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: pgsignals-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[pgsignals]\n{name} = pgsignals_{name}_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("pgsignals_entity_plugin", None)


@pytest.mark.usefixtures("installed_plugin")
def test_a_resolver_of_an_installed_plugin(
    hub: Hub,
    dsn: str,
    db: Database,
    entity: Entity,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is found by its entry point; a plugin that is broken is named and keeps nobody."""
    hub.on(entity)(recorder)
    hub.start(dsn, [watch(entity, "inserted", extra=["name"])])
    db("INSERT INTO things (thing_name) VALUES ('a')")
    assert recorder.wait(1)[0].values == {"name": "a"}
    assert "broken of pgsignals-broken 1.2: ModuleNotFoundError" in caplog.text
