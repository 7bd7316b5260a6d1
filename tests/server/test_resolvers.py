"""What models say of their tables, and how records are found again."""

from __future__ import annotations

import enum
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import django
import django.conf
import django.db
import flask
import flask_sqlalchemy
import psycopg
import psycopg2
import psycopg2.extras
import pytest
import sqlalchemy as sa
import sqlmodel
from django.db import models
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.hybrid import hybrid_property

from pgsignals.core.tables import Table, TableRef
from pgsignals.errors import ModelError
from pgsignals.resolvers import BUILTIN, DjangoResolver, PlainResolver, SQLAlchemyResolver
from pgsignals.triggers.table_lookup import describe, resolve
from tests.connections import django_connection, driver_url

SQLALCHEMY, DJANGO, PLAIN = SQLAlchemyResolver(), DjangoResolver(), PlainResolver()


class Base(orm.DeclarativeBase):
    pass


class Abstract(Base):
    __abstract__ = True


class Team(Base):
    __tablename__ = "teams"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    members: orm.Mapped[list[User]] = orm.relationship(lazy="joined", order_by="User.id")


class User(Base):
    __tablename__ = "User Table"
    id: orm.Mapped[int] = orm.mapped_column("user%id", primary_key=True)
    email: orm.Mapped[str] = orm.mapped_column("e:mail")
    team_id: orm.Mapped[int | None] = orm.mapped_column(sa.ForeignKey(Team.id))
    shout = orm.column_property(sa.func.upper(email.column))

    @hybrid_property
    def domain(self) -> str:
        return self.email.partition("@")[2]


class Employee(Base):
    """Joined inheritance from here to Manager, single-table from there to Director."""

    __tablename__ = "employees"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}  # noqa: RUF012
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    kind: orm.Mapped[str]
    name: orm.Mapped[str]


class Manager(Employee):
    __tablename__ = "managers"
    __mapper_args__ = {"polymorphic_identity": "manager"}  # noqa: RUF012
    id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey(Employee.id), primary_key=True)
    budget: orm.Mapped[int] = orm.mapped_column("budget_eur")


class Director(Manager):
    __mapper_args__ = {"polymorphic_identity": "director"}  # noqa: RUF012


class Kind(enum.Enum):
    CAR = 1
    VAN = 2


class Vehicle(Base):
    __tablename__ = "vehicles"
    __table_args__ = {"schema": "fleet"}  # noqa: RUF012
    __mapper_args__ = {"polymorphic_on": "kind"}  # noqa: RUF012
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    kind: orm.Mapped[Kind] = orm.mapped_column(sa.Enum(Kind, native_enum=False))


class Car(Vehicle):
    __mapper_args__ = {"polymorphic_identity": Kind.CAR}  # noqa: RUF012


class Van(Car):
    __mapper_args__ = {"polymorphic_identity": Kind.VAN}  # noqa: RUF012


class Site(Base):
    __tablename__ = "sites"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    note: orm.Mapped[str | None]


class Depot(Site):
    __tablename__ = "depots"
    __mapper_args__ = {"concrete": True}  # noqa: RUF012
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    size: orm.Mapped[int]


class Joined(Base):
    __table__ = sa.join(Team.__table__, User.__table__)
    id = orm.column_property(Team.__table__.c.id, User.__table__.c.team_id)
    user_id = User.__table__.c["user%id"]


class Money(sa.types.TypeDecorator[str]):
    """A type whose Python values are not what the database holds."""

    impl = sa.Numeric
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: object) -> Decimal | None:
        return None if value is None else Decimal(value.removeprefix("EUR "))

    def process_result_value(self, value: Decimal | None, dialect: object) -> str | None:
        return None if value is None else f"EUR {value}"


prices = sa.Table(
    sa.sql.quoted_name("Prices", quote=True),
    Base.metadata,
    sa.Column("user%id", sa.Integer, primary_key=True, key="user_id"),
    sa.Column("amount", Money, primary_key=True),
    schema="fleet",
)


class Hero(sqlmodel.SQLModel, table=True):
    id: UUID = sqlmodel.Field(primary_key=True)
    name: str


class HeroIn(sqlmodel.SQLModel):
    name: str


if not django.conf.settings.configured:
    django.conf.settings.configure()
django.setup()


class Stamped(models.Model):
    stamp = models.IntegerField(null=True)

    class Meta:
        abstract = True
        app_label = "resolvers"


class Place(Stamped):
    owner = models.ForeignKey("self", models.CASCADE, null=True, db_column="OWNER")

    class Meta:
        app_label = "resolvers"
        db_table = 'geo"."place'


class PlaceProxy(Place):
    class Meta:
        app_label = "resolvers"
        proxy = True


class Restaurant(Place):
    stars = models.IntegerField(default=0)

    class Meta:
        app_label = "resolvers"
        db_table = '"geo"."restaurant"'


class Code(models.Model):
    code = models.UUIDField(primary_key=True, db_column="Co de")

    class Meta:
        app_label = "resolvers"
        db_table = "a.code"


def ref(model: object) -> TableRef:
    return resolve(model, BUILTIN)[0]


def described(dsn: str, model: object) -> Table:
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        return describe(cursor, ref(model))


def execute(dsn: str, script: str) -> None:
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(script)
        connection.commit()


@contextmanager
def queries(engine: sa.Engine) -> Iterator[list[str]]:
    """The statements sent inside the block."""
    sent: list[str] = []

    def record(conn: object, cursor: object, statement: str, *rest: object) -> None:
        sent.append(statement)

    sa.event.listen(engine, "before_cursor_execute", record)
    yield sent
    sa.event.remove(engine, "before_cursor_execute", record)


@pytest.fixture(params=["psycopg2", "psycopg"])
def engine(request: pytest.FixtureRequest, dsn: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(driver_url(dsn, request.param))
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("fleet"))
        Base.metadata.create_all(connection)
        sqlmodel.SQLModel.metadata.create_all(connection)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: sa.Engine) -> Iterator[orm.Session]:
    with orm.Session(engine) as session:
        session.add_all([User(id=n, email=f"{n}@example.org") for n in range(1, 5)])
        session.commit()
        yield session


# What models say


def test_imports_no_framework() -> None:
    """Who uses none of the frameworks has none of them imported."""
    script = (
        "import sys, pgsignals.resolvers as r; assert r.PlainResolver().resolve('t');"
        "assert not {'sqlalchemy', 'django', 'psycopg'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_attribute_names_are_not_column_names() -> None:
    """Attributes map to columns; expressions, hybrids and relationships are none."""
    assert ref(User) == TableRef(
        "User Table",
        None,
        {"id": "user%id", "email": "e:mail", "team_id": "team_id"},
        key=("user%id",),
    )


def test_names_are_plain_text() -> None:
    """SQLAlchemy's quoted names do not leak out, and a Table's keys are its attributes."""
    found = ref(prices)
    assert found == TableRef(
        "Prices", "fleet", {"user_id": "user%id", "amount": "amount"}, key=("user%id", "amount")
    )
    assert type(found.name) is str


def test_joined_inheritance_is_the_classes_own_table() -> None:
    """Attributes of the parent's table are known to be elsewhere."""
    assert ref(Manager) == TableRef(
        "managers",
        None,
        {"id": "id", "budget": "budget_eur"},
        key=("id",),
        elsewhere={"kind": "employees", "name": "employees"},
    )


def test_single_table_inheritance_is_a_restriction() -> None:
    """A subclass is its rows and those of its subclasses, by the values that are stored."""
    assert ref(Vehicle).only is None
    assert ref(Car).only == ("kind", ("CAR", "VAN"))
    assert ref(Van).only == ("kind", ("VAN",))
    assert ref(Van).schema == "fleet"


def test_concrete_inheritance_is_a_table_of_its_own() -> None:
    """A concrete subclass has nothing to do with its parent's table."""
    found = ref(Depot)
    assert (found.name, found.only, found.elsewhere) == ("depots", None, {})
    assert found.attributes == {"id": "id", "size": "size"}


def test_key_that_only_the_mapper_knows() -> None:
    """A Table without a primary key has the one that the mapper was given."""
    registry = orm.registry()
    table = sa.Table("events", registry.metadata, sa.Column("ID", sa.Integer))

    class Happening:
        pass

    registry.map_imperatively(Happening, table, primary_key=[table.c.ID])
    assert ref(Happening).key == ("ID",)


def test_sqlmodel_and_flask_sqlalchemy() -> None:
    """Both are SQLAlchemy's models."""
    db: Any = flask_sqlalchemy.SQLAlchemy()

    class BlogPost(db.Model):  # type: ignore[misc]
        id = db.Column(db.Integer, primary_key=True)

    assert ref(Hero) == TableRef("hero", None, {"id": "id", "name": "name"}, key=("id",))
    assert ref(BlogPost) == TableRef("blog_post", None, {"id": "id"}, key=("id",))
    with pytest.raises(ModelError, match="Model is not mapped"):
        ref(db.Model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Base, "Base is not mapped to a table: it is abstract, a declarative base"),
        (Abstract, "Abstract is not mapped to a table"),
        (HeroIn, "an SQLModel without table=True"),
        (Joined, "Joined is mapped to a join.*Give the classes or Tables that it is made of"),
        (orm.aliased(User), "not a table but selects from one"),
        (prices.alias(), "not a table but selects from one"),
        (Director, "cannot be told by a column of its table managers. Give its parent Manager"),
        (models.Model, "Model is abstract and has no table"),
        (Stamped, "Stamped is abstract and has no table"),
        ("a.b.c", r"'table' or 'schema\.table'"),
        (User(), "is an instance of User: give the class"),
        (int, "is not something that pgsignals can watch"),
    ],
)
def test_models_without_a_table_say_the_fix(model: object, message: str) -> None:
    """A model that has no rows of its own is an error that says what to give instead."""
    with pytest.raises(ModelError, match=message):
        ref(model)


def test_django_fields() -> None:
    """A foreign key goes by its attname first, and by its name too."""
    found = ref(Place)
    assert found == TableRef(
        "place",
        "geo",
        {"id": "id", "stamp": "stamp", "owner_id": "OWNER", "owner": "OWNER"},
        key=("id",),
    )
    assert list(found.attributes).index("owner_id") < list(found.attributes).index("owner")


def test_django_inheritance() -> None:
    """A proxy is its model's table; a child model has its own, with the rest elsewhere."""
    assert ref(PlaceProxy) == ref(Place)
    found = ref(Restaurant)
    assert (found.schema, found.name, found.key) == ("geo", "restaurant", ("place_ptr_id",))
    assert found.attributes == {
        "place_ptr_id": "place_ptr_id",
        "place_ptr": "place_ptr_id",
        "stars": "stars",
    }
    assert set(found.elsewhere) == {"id", "stamp", "owner_id"}


def test_django_dot_is_part_of_the_name() -> None:
    """``db_table`` is one name unless it has quotes, as Django itself has it."""
    assert (ref(Code).schema, ref(Code).name, ref(Code).key) == (None, "a.code", ("Co de",))


@pytest.mark.skipif(django.VERSION < (5, 2), reason="composite primary keys came with Django 5.2")
def test_django_composite_key(dsn: str) -> None:
    """A composite primary key is its columns, and records are found by it."""

    class Line(models.Model):
        pk = models.CompositePrimaryKey("order_no", "line_no")
        order_no = models.IntegerField()
        line_no = models.IntegerField(db_column="line")

        class Meta:
            app_label = "resolvers"

    assert ref(Line).key == ("order_no", "line")
    with django_connection(dsn) as connection:
        with connection.schema_editor() as editor:
            editor.create_model(Line)
        for order_no, line_no in [(1, 1), (1, 2), (2, 1), (2, 2)]:
            Line._base_manager.create(order_no=order_no, line_no=line_no)
        found = DJANGO.load(Line, described(dsn, Line), None, [(2, 1), (1, 2), (9, 9)])
    assert found is not None
    assert [record.pk for record in found] == [(2, 1), (1, 2)]


# Loading through SQLAlchemy


def test_loads_objects_in_the_order_of_ids(dsn: str, session: orm.Session) -> None:
    """One query gives the objects that are there, each once, in the order of the ids."""
    ids = [(3,), (99,), (1,), (3,)]
    with queries(session.get_bind()) as sent:  # type: ignore[arg-type]
        found = SQLALCHEMY.load(User, described(dsn, User), session, ids)
    assert found is not None
    assert [user.id for user in found] == [3, 1]
    assert all(isinstance(user, User) for user in found)
    assert len(sent) == 1


def test_loads_what_the_record_is_now(dsn: str, session: orm.Session) -> None:
    """An object that the session read before is refreshed."""
    user = session.get_one(User, 1)
    assert user.email == "1@example.org"
    execute(dsn, 'UPDATE "User Table" SET "e:mail" = \'new\'')
    assert SQLALCHEMY.load(User, described(dsn, User), session, [(1,)]) == [user]
    assert user.email == "new"


def test_loads_any_number_by_one_query(dsn: str, session: orm.Session) -> None:
    """More ids than a protocol message has room for parameters are still one query."""
    ids = [(n,) for n in range(100_000, -1, -1)]
    with queries(session.get_bind()) as sent:  # type: ignore[arg-type]
        found = SQLALCHEMY.load(User, described(dsn, User), session, ids)
    assert found is not None
    assert [user.id for user in found] == [4, 3, 2, 1]
    assert len(sent) == 1


def test_loads_nothing_without_a_query(dsn: str, session: orm.Session) -> None:
    """No ids, no query."""
    table = described(dsn, User)
    with queries(session.get_bind()) as sent:  # type: ignore[arg-type]
        assert SQLALCHEMY.load(User, table, session, []) == []
        assert PLAIN.load("User Table", table, session, []) == []
    assert sent == []


def test_loads_eagerly_joined_collections(dsn: str, session: orm.Session) -> None:
    """An object whose collection is fetched by a join comes once, with all of it."""
    session.add(Team(id=1, members=list(session.scalars(sa.select(User).limit(3)))))
    session.add(Team(id=2))
    session.commit()
    found = SQLALCHEMY.load(Team, described(dsn, Team), session, [(2,), (1,)])
    assert found is not None
    assert [(team.id, len(team.members)) for team in found] == [(2, 0), (1, 3)]


def test_loads_rows_through_a_connection_or_engine(dsn: str, engine: sa.Engine) -> None:
    """Without an identity map there are dicts by attribute, and the transaction is the caller's."""
    execute(dsn, "INSERT INTO \"User Table\" VALUES (1, 'a', NULL)")
    table, row = described(dsn, User), {"id": 1, "email": "a", "team_id": None}
    with engine.connect() as connection:
        assert SQLALCHEMY.load(User, table, connection, [(1,)]) == [row]
        assert connection.in_transaction()
    assert SQLALCHEMY.load(User, table, engine, [(1,)]) == [row]


def test_loads_inherited_objects(dsn: str, session: orm.Session) -> None:
    """Joined, single-table and concrete inheritance find their objects by their own tables."""
    session.add_all(
        [
            Employee(id=1, name="e"),
            Manager(id=2, name="m", budget=5),
            Director(id=3, name="d", budget=9),
            Car(id=1),
            Van(id=2),
            Depot(id=1, size=4),
        ]
    )
    session.commit()

    def load(model: type[Any], *ids: int) -> list[type[Any]]:
        keys = [(n,) for n in ids]
        found = SQLALCHEMY.load(model, described(dsn, model), session, keys)
        assert found is not None
        return [type(record) for record in found]

    assert load(Employee, 3, 1, 2) == [Director, Employee, Manager]
    assert load(Manager, 3, 1, 2) == [Director, Manager]
    assert load(Car, 2, 1) == [Van, Car]
    assert load(Van, 2, 1) == [Van]
    assert load(Depot, 1) == [Depot]
    connection = session.connection()
    assert SQLALCHEMY.load(Manager, described(dsn, Manager), connection, [(2,)]) == [
        {"id": 2, "kind": "manager", "name": "m", "budget": 5}
    ]


def test_loads_keys_as_the_database_has_them(dsn: str, session: orm.Session) -> None:
    """A key's Python type in the model may be any other than the event's."""
    session.execute(prices.insert().values(user_id=1, amount="EUR 1.50"))
    session.add(Hero(id=UUID(int=7), name="Nora"))
    session.commit()
    table = described(dsn, prices)
    assert SQLALCHEMY.load(prices, table, session, [(1, Decimal("1.50"))]) == [
        {"user_id": 1, "amount": "EUR 1.50"}
    ]
    for given in (UUID(int=7), str(UUID(int=7))):
        found = SQLALCHEMY.load(Hero, described(dsn, Hero), session, [(given,)])
        assert found is not None
        assert [hero.name for hero in found] == ["Nora"]


def test_loads_through_scoped_sessions(dsn: str, engine: sa.Engine) -> None:
    """scoped_session, SQLModel's Session and Flask-SQLAlchemy's ``db.session`` are sessions."""
    execute(dsn, f"INSERT INTO hero VALUES ('{UUID(int=1)}', 'Nora')")
    table, ids = described(dsn, Hero), [(UUID(int=1),)]
    scoped = orm.scoped_session(orm.sessionmaker(engine))
    with sqlmodel.Session(engine) as own:
        for session in (scoped, own):
            found = SQLALCHEMY.load(Hero, table, session, ids)
            assert found is not None
            assert [hero.name for hero in found] == ["Nora"]
    scoped.remove()

    db: Any = flask_sqlalchemy.SQLAlchemy()
    app = flask.Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = engine.url
    db.init_app(app)

    class Knight(db.Model):  # type: ignore[misc]
        __tablename__ = "hero"
        id = db.Column(db.String, primary_key=True)
        name = db.Column(db.String)

    with app.app_context():
        found = SQLALCHEMY.load(Knight, table, db.session, ids)
        assert found is not None
        assert [knight.name for knight in found] == ["Nora"]
        db.session.remove()
        db.engine.dispose()


def test_sessions_of_other_kinds_are_not_used(dsn: str, engine: sa.Engine) -> None:
    """None says that the session does not fit the model."""
    table = described(dsn, User)
    with closing(psycopg2.connect(dsn)) as connection:
        for session in (None, "default", connection, AsyncSession()):
            assert SQLALCHEMY.load(User, table, session, [(1,)]) is None
    for session in (None, "default", AsyncSession(), object()):
        assert PLAIN.load("User Table", table, session, [(1,)]) is None


# Loading through Django


@pytest.fixture
def places(dsn: str) -> Iterator[Any]:
    execute(
        dsn,
        """
        CREATE SCHEMA geo;
        CREATE TABLE geo.place (id int PRIMARY KEY, stamp int, "OWNER" int);
        CREATE TABLE geo.restaurant (place_ptr_id int PRIMARY KEY, stars int);
        CREATE TABLE "a.code" ("Co de" uuid PRIMARY KEY);
        INSERT INTO geo.place VALUES (1, 10, NULL), (2, 20, 1), (3, 30, NULL);
        INSERT INTO geo.restaurant VALUES (2, 5), (3, 0);
        """,
    )
    with django_connection(dsn) as connection:
        yield connection


@pytest.mark.parametrize("how", ["nothing", "alias", "connection", "proxy", "queryset"])
def test_django_loads_instances_in_the_order_of_ids(dsn: str, places: Any, how: str) -> None:
    """One query through any of the ways to name the database gives the instances in order."""
    session = {
        "nothing": None,
        "alias": "default",
        "connection": places,
        "proxy": django.db.connection,
        "queryset": Place._base_manager.all(),
    }[how]
    sent: list[str] = []

    def record(run: Callable[..., Any], sql: str, *rest: Any) -> Any:
        sent.append(sql)
        return run(sql, *rest)

    with places.execute_wrapper(record):
        found = DJANGO.load(Place, described(dsn, Place), session, [(3,), (99,), (1,), (3,)])
        assert found is not None
        assert [(place.id, place.stamp) for place in found] == [(3, 30), (1, 10)]
    assert len(sent) == 1


def test_django_loads_inherited_instances(dsn: str, places: Any) -> None:
    """Child models and proxies come whole, and are what was asked for."""
    restaurants = DJANGO.load(Restaurant, described(dsn, Restaurant), None, [(3,), (1,), (2,)])
    assert restaurants is not None
    assert [(r.id, r.stamp, r.stars) for r in restaurants] == [(3, 30, 0), (2, 20, 5)]
    proxies = DJANGO.load(PlaceProxy, described(dsn, PlaceProxy), None, [(1,)])
    assert proxies is not None
    assert [type(place) for place in proxies] == [PlaceProxy]


def test_django_loads_through_a_queryset(dsn: str, places: Any) -> None:
    """A QuerySet's own restrictions and joins hold; one of another model is not used."""
    table, ids = described(dsn, Place), [(1,), (2,)]
    chosen = Place._base_manager.select_related("owner").filter(owner__stamp=10)
    found = DJANGO.load(Place, table, chosen, ids)
    assert found is not None
    assert [(place.id, place.owner.id) for place in found] == [(2, 1)]
    assert DJANGO.load(Place, table, Code._base_manager.all(), ids) is None
    assert DJANGO.load(Place, table, object(), ids) is None


def test_django_loads_by_any_form_of_a_key(dsn: str, places: Any) -> None:
    """UUIDs are found as UUIDs and as text, and stay in order."""
    keys = [UUID(int=n) for n in (2, 1, 3)]
    Code._base_manager.bulk_create(Code(code=key) for key in sorted(keys))
    for ids in ([(key,) for key in keys], [(str(key),) for key in keys]):
        found = DJANGO.load(Code, described(dsn, Code), None, ids)
        assert found is not None
        assert [record.code for record in found] == keys


# Loading by a table's name

AWKWARD = '"My % Schema"."A :table ""x"""'


@contextmanager
def plain_session(kind: str, dsn: str) -> Iterator[Any]:
    if kind in ("psycopg2", "psycopg"):
        connect: Any = {"psycopg2": psycopg2, "psycopg": psycopg}[kind].connect
        with closing(connect(dsn)) as connection:
            yield connection
    elif kind.endswith("cursor"):
        connect = {"psycopg2-cursor": psycopg2, "psycopg-cursor": psycopg}[kind].connect
        with closing(connect(dsn)) as connection:
            yield connection.cursor()
    elif kind == "django":
        with django_connection(dsn) as connection:
            yield connection
    else:
        engine = sa.create_engine(driver_url(dsn, "psycopg" if kind == "engine" else "psycopg2"))
        if kind == "engine":
            yield engine
        else:
            with engine.connect() if kind == "connection" else orm.Session(engine) as opened:
                yield opened
        engine.dispose()


@pytest.mark.parametrize(
    "kind",
    [
        "psycopg2",
        "psycopg",
        "psycopg2-cursor",
        "psycopg-cursor",
        "engine",
        "connection",
        "session",
        "django",
    ],
)
def test_plain_loads_dicts_through_any_session(dsn: str, kind: str) -> None:
    """Dicts by column name, in the order of ids, from a table with the most awkward names."""
    execute(
        dsn,
        f"""
        CREATE SCHEMA "My % Schema";
        CREATE TABLE {AWKWARD} ("%s" int, ":k" text, "v%(a)s" bool, PRIMARY KEY (":k", "%s"));
        INSERT INTO {AWKWARD} VALUES (1, 'a', true), (2, 'a', false), (1, 'b', NULL);
        """,
    )
    table = described(dsn, AWKWARD)
    with plain_session(kind, dsn) as session:
        found = PLAIN.load(AWKWARD, table, session, [("b", 1), ("x", 1), ("a", 2)])
    assert found == [
        {"%s": 1, ":k": "b", "v%(a)s": None},
        {"%s": 2, ":k": "a", "v%(a)s": False},
    ]


def test_plain_uses_the_callers_transaction(dsn: str) -> None:
    """The load sees what the caller wrote, commits nothing and leaves the settings alone."""
    execute(dsn, "CREATE TABLE t (id int PRIMARY KEY)")
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO t VALUES (1); SELECT generate_series(1, 3)")
        assert PLAIN.load("t", described(dsn, "t"), connection, [(1,)]) == [{"id": 1}]
        assert PLAIN.load("t", described(dsn, "t"), cursor, [(1,)]) == [{"id": 1}]
        assert cursor.fetchall() == [(1,), (2,), (3,)]
        connection.rollback()
        assert PLAIN.load("t", described(dsn, "t"), connection, [(1,)]) == []


@pytest.mark.parametrize(
    ("type_name", "literal"),
    [
        ("uuid", "00000000-0000-0000-0000-00000000000a"),
        ("bytea", "\\x00ff41"),
        ("numeric", "12345678901234567890.10"),
        ("numeric(10,2)", "1.50"),
        ("float8", "0.1"),
        ("real", "0.1"),
        ("bool", "true"),
        ("date", "2026-11-02"),
        ("timestamptz", "2026-11-02 10:00:00.000001+05:30"),
        ("timestamp", "2026-11-02 10:00:00"),
        ("time", "10:00:00.5"),
        ("interval", "-3 days +04:05:06.7"),
        ("character(5)", "ab"),
        ("varchar(3)", "abc"),
        ("bit(3)", "101"),
        ('"char"', "x"),
        ("text", 'it\'s "%s" :p \\ 🦊'),
        ("text[]", '{"a\\"b","c\\\\d",NULL,"{}"}'),
        ("int[]", "{{1,2},{3,4}}"),
        ("jsonb", '{"a": ["b", null, 1]}'),
        ("jsonb", '["b"]'),
        ("inet", "10.0.0.1"),
        ("int4range", "[1,5)"),
        ("elsewhere.mood", "so so"),
        ("elsewhere.small", "7"),
    ],
)
def test_plain_finds_keys_of_any_type(dsn: str, type_name: str, literal: str) -> None:
    """A key as psycopg2 returned it finds its record again."""
    execute(
        dsn,
        f"""
        CREATE SCHEMA elsewhere;
        CREATE TYPE elsewhere.mood AS ENUM ('so so');
        CREATE DOMAIN elsewhere.small AS int CHECK (VALUE < 10);
        CREATE TABLE t (id {type_name} PRIMARY KEY);
        """,
    )
    table = described(dsn, "t")
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO t VALUES (%s) RETURNING id", [literal])
        row = cursor.fetchone()
        assert row is not None
        assert PLAIN.load("t", table, connection, [row]) == [{"id": row[0]}]


def test_plain_finds_keys_given_as_python_values(dsn: str) -> None:
    """Values find what they are equal to, however the session renders and reads such types."""
    execute(
        dsn,
        """
        CREATE TABLE t (a uuid, b interval, c timestamptz, d bytea, PRIMARY KEY (a, b, c, d));
        INSERT INTO t VALUES ('00000000-0000-0000-0000-00000000000a', '-1 hour',
                              '2026-01-01 00:00:00Z', '\\x00ff');
        """,
    )
    at = datetime(2026, 1, 1, 5, 30, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    key: Sequence[tuple[object, ...]] = [(UUID(int=10), timedelta(hours=-1), at, b"\0\xff")]
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("SET datestyle = 'ISO, DMY'; SET intervalstyle = sql_standard")
        cursor.execute("SET timezone = 'Asia/Kolkata'; SET bytea_output = escape")
        found = PLAIN.load("t", described(dsn, "t"), connection, key)
    assert found is not None
    assert len(found) == 1
