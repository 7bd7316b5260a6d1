"""Batches that save queries: eager loading, awaiting a load, and what 10,000 updates cost."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import pgsignals
from pgsignals import Batch, ConfigurationError, Hub
from tests.conftest import Database, Recorder


class Base(orm.DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    customer: orm.Mapped[str]
    lines: orm.Mapped[list[Line]] = orm.relationship(order_by="Line.id")


class Line(Base):
    __tablename__ = "lines"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    order_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey(Order.id))
    text: orm.Mapped[str]


@pytest.fixture
def engine(dsn: str) -> Iterator[sa.Engine]:
    """An engine on a database with 100 orders of two lines each."""
    made = sa.create_engine(dsn.replace("postgresql://", "postgresql+psycopg2://"))
    Base.metadata.create_all(made)
    with made.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO orders SELECT n, 'new' FROM generate_series(1, 100) n;"
            "INSERT INTO lines SELECT n, 1 + n / 2, 'line' FROM generate_series(0, 199) n"
        )
    yield made
    made.dispose()


@pytest.fixture
def queries(engine: sa.Engine) -> list[str]:
    """The statements that the engine sends from now on."""
    sent: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    return sent


def test_ten_thousand_updates_of_a_hundred_records(
    hub: Hub, dsn: str, db: Database, engine: sa.Engine, queries: list[str]
) -> None:
    """10,000 updates of 100 records, with what belongs to them, are loaded by two queries."""
    state: dict[int, tuple[str, int]] = {}
    single, loaded = Recorder(), Recorder()

    # One period, which stop() ends: how many seconds 100 statements take is the machine's affair.
    @hub.on_batch(Order, "updated", every=3600)
    def refresh(batch: Batch) -> None:
        with orm.Session(engine) as session:
            for order in batch.load(session, options=[orm.selectinload(Order.lines)]):
                state[order.id] = (order.customer, len(order.lines))
        loaded(len(batch))

    hub.subscribe(single, Order, "updated")
    hub.start(engine, [Order])
    for number in range(100):
        db("UPDATE orders SET customer = %s", [f"customer {number}"])
    single.wait(10_000)
    hub.stop()
    assert state == dict.fromkeys(range(1, 101), ("customer 99", 2))
    assert loaded.items == [100]
    # The orders and their lines.
    assert len(queries) == 2


def events_of(hub: Hub, start: Callable[[], Hub], db: Database) -> Batch:
    """The events of two updated orders."""
    recorder = Recorder()
    hub.subscribe(recorder, Order, "updated")
    start()
    db("UPDATE orders SET customer = 'Ann' WHERE id <= 2")
    return Batch(tuple(recorder.wait(2)))


def test_eager_loading_of_sqlalchemy(
    hub: Hub, db: Database, engine: sa.Engine, queries: list[str]
) -> None:
    """options= are those of select(), for one event and for a batch; misuse is explained."""
    batch = events_of(hub, lambda: hub.start(engine, [(Order, "updated")]), db)
    with orm.Session(engine) as session:
        order = batch.events[0].load(session, options=[orm.joinedload(Order.lines)])
        assert len(queries) == 1
        assert [line.text for line in order.lines] == ["line", "line"]
        assert len(queries) == 1
        with pytest.raises(ConfigurationError, match=r"does not know option= \(did you mean"):
            batch.load(session, option=[])
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="dicts of Order"):
        batch.load(connection, options=[orm.joinedload(Order.lines)])


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_awaiting_a_load(hub: Hub, dsn: str, db: Database, engine: sa.Engine, driver: str) -> None:
    """aload takes SQLAlchemy's asynchronous sessions, connections and engines; start the engine."""
    asynchronous = create_async_engine(dsn.replace("postgresql://", f"postgresql+{driver}://"))
    batch = events_of(hub, lambda: hub.start(asynchronous, [(Order, "updated")]), db)

    async def main() -> None:
        async with AsyncSession(asynchronous) as session:
            options = [orm.selectinload(Order.lines)]
            orders = await batch.aload(session, options=options)
            assert [(order.id, len(order.lines)) for order in orders] == [(1, 2), (2, 2)]
            order = await batch.events[0].aload(session)
            assert order is orders[0]
        async with asynchronous.connect() as connection:
            assert await batch.aload(connection) == expected
        assert await batch.aload(asynchronous) == expected
        await asynchronous.dispose()

    expected = [{"id": 1, "customer": "Ann"}, {"id": 2, "customer": "Ann"}]
    asyncio.run(main())


def test_awaiting_a_load_of_a_plain_table(hub: Hub, dsn: str, db: Database) -> None:
    """aload with a psycopg2 connection reads in another thread."""
    db("CREATE TABLE items (id int PRIMARY KEY)")
    recorder = Recorder()
    hub.subscribe(recorder, "items")
    hub.start(dsn, ["items"])
    db("INSERT INTO items VALUES (1)")
    [event] = recorder.wait(1)
    assert asyncio.run(event.aload(db.connection)) == {"id": 1}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgresql://ann:p%40ss@h:5433/shop",
            "user=ann password=p@ss dbname=shop host=h port=5433",
        ),
        (
            "postgresql+psycopg2://ann@/shop?host=/tmp&sslmode=require",
            "user=ann dbname=shop host=/tmp sslmode=require",
        ),
        ("postgresql+psycopg2://ann@/shop?service=main", "user=ann dbname=shop service=main"),
        (
            "postgresql+psycopg2://ann@/shop?host=a:5432&host=b:5433",
            "user=ann dbname=shop host=a,b port=5432,5433",
        ),
        (
            "postgresql+psycopg://ann@h/shop?options=-c%20a",
            "user=ann dbname=shop host=h options='-c a'",
        ),
        (
            "postgresql+asyncpg://ann:x@h:5/shop?ssl=require&prepared_statement_cache_size=0",
            "user=ann password=x dbname=shop host=h port=5 sslmode=require",
        ),
        ("postgresql+asyncpg://", ""),
    ],
)
def test_the_dsn_of_an_engine(url: str, expected: str) -> None:
    """What an engine's URL says of the database is what libpq is told, whatever its driver.

    The URL itself says the same, as a text and as an object.
    """
    from psycopg2.extensions import parse_dsn

    from pgsignals.postgres.dsn import dsn_of, libpq_dsn

    engine: Any = (
        create_async_engine(url)
        if "asyncpg" in url or url.startswith("postgresql+psycopg:")
        else sa.create_engine(url)
    )
    for given in (engine, engine.url, url, f"  {url}\n"):
        assert parse_dsn(libpq_dsn(dsn_of(given))) == parse_dsn(expected), given


def test_engines_that_do_not_fit(hub: Hub) -> None:
    """An engine of another database, and anything else, are refused without a password."""
    with pytest.raises(ConfigurationError, match="engine is of sqlite"):
        hub.start(sa.create_engine("sqlite://"), ["items"])
    with pytest.raises(ConfigurationError, match=r"\*\*\*.*AsyncEngine") as failure:
        hub.start({"password": "s3cret"}, ["items"])  # type: ignore[arg-type]
    assert "s3cret" not in str(failure.value)


def test_an_engines_password_is_never_shown(hub: Hub, server: Any) -> None:
    """The password of an engine's URL is in no message."""
    engine = sa.create_engine("postgresql+psycopg2://ann:s3cr%40t@127.0.0.1:1/shop")
    with pytest.raises(pgsignals.ConnectError) as failure:
        hub.start(engine, ["items"])
    assert "s3cr" not in repr(failure.value)


def test_importing_needs_no_framework() -> None:
    """pgsignals imports neither SQLAlchemy nor Django nor asgiref."""
    import subprocess

    program = "import sys, pgsignals; print([m for m in ('sqlalchemy', 'django', 'asgiref') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n"
