"""``muted`` and ``context``: for how long they hold, on every kind of connection."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any
from uuid import UUID

import django
import django.conf
import django.db
import psycopg
import psycopg2
import psycopg2.extras
import pytest
import sqlalchemy as sa
from django.db.transaction import atomic
from sqlalchemy import orm

from pgsignals.errors import ConfigurationError, StateError
from pgsignals.postgres.transaction import context, muted
from tests.connections import django_connection, driver_url


@dataclass
class Caller:
    """A connection as its user sees it, and how one uses it."""

    connection: Any
    execute: Callable[[str], Any]
    rollback: Callable[[], object]
    commit: Callable[[], object]
    idle: Callable[[], bool]

    def setting(self, name: str) -> str:
        found = self.execute(f"SELECT coalesce(current_setting('pgsignals.{name}', true), '')")
        return str(found)

    @property
    def muted(self) -> bool:
        return self.setting("muted") == "on"

    @property
    def context(self) -> Any:
        return json.loads(self.setting("context") or "{}")


def dbapi_caller(connection: Any) -> Caller:
    def execute(query: str) -> Any:
        with connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchone()[0] if cursor.description else None

    return Caller(
        connection,
        execute,
        connection.rollback,
        connection.commit,
        lambda: connection.info.transaction_status == 0,
    )


def sqlalchemy_caller(connection: Any) -> Caller:
    def execute(query: str) -> Any:
        result = connection.execute(sa.text(query))
        return result.scalar() if result.returns_rows else None

    return Caller(
        connection,
        execute,
        connection.rollback,
        connection.commit,
        lambda: not connection.in_transaction(),
    )


def django_caller(connection: Any) -> Caller:
    caller = dbapi_caller(connection)
    caller.idle = lambda: connection.connection.info.transaction_status == 0
    return caller


KINDS = [
    "psycopg2",
    "psycopg",
    "sqlalchemy-connection",
    "sqlalchemy-connection-psycopg",
    "sqlalchemy-session",
    "sqlalchemy-scoped-session",
    "django",
]


def open_caller(kind: str, dsn: str, stack: ExitStack) -> Caller:
    if kind == "psycopg2":
        return dbapi_caller(stack.enter_context(closing(psycopg2.connect(dsn))))
    if kind == "psycopg":
        return dbapi_caller(stack.enter_context(closing(psycopg.connect(dsn))))
    if kind == "django":
        connection = stack.enter_context(django_connection(dsn))
        connection.set_autocommit(False)
        return django_caller(connection)
    driver = "psycopg" if kind.endswith("psycopg") else "psycopg2"
    engine = sa.create_engine(driver_url(dsn, driver))
    stack.callback(engine.dispose)
    if kind.startswith("sqlalchemy-connection"):
        return sqlalchemy_caller(stack.enter_context(engine.connect()))
    if kind == "sqlalchemy-session":
        return sqlalchemy_caller(stack.enter_context(orm.Session(engine)))
    scoped = orm.scoped_session(orm.sessionmaker(engine))
    stack.callback(scoped.remove)
    caller = sqlalchemy_caller(scoped)
    caller.idle = lambda: not scoped().in_transaction()
    return caller


@pytest.fixture(params=KINDS)
def caller(request: pytest.FixtureRequest, dsn: str) -> Iterator[Caller]:
    with ExitStack() as stack:
        caller = open_caller(request.param, dsn, stack)
        yield caller
        caller.rollback()


@pytest.fixture
def connection(dsn: str) -> Iterator[Any]:
    with closing(psycopg2.connect(dsn)) as connection:
        yield connection


def test_lasts_for_the_block(caller: Caller) -> None:
    """Silence and context hold inside the block, and are gone after it."""
    with muted(caller.connection), context(caller.connection, user_id=7):
        assert caller.muted
        assert caller.context == {"user_id": 7}
    assert not caller.muted
    assert caller.context == {}


def test_nested_blocks_restore_the_outer_one(caller: Caller) -> None:
    """A nested context adds its fields and takes them away again; silence stays the outer one's."""
    with muted(caller.connection), context(caller.connection, user_id=7, trace="a"):
        with muted(caller.connection), context(caller.connection, trace="b", job=1):
            assert caller.context == {"user_id": 7, "trace": "b", "job": 1}
        assert caller.muted
        assert caller.context == {"user_id": 7, "trace": "a"}


def test_restores_when_the_block_raises(caller: Caller) -> None:
    """An exception that leaves the transaction whole ends the silence like the block's end."""
    with pytest.raises(KeyError), muted(caller.connection):
        raise KeyError
    assert not caller.muted


def test_commit_inside_the_block_ends_it(caller: Caller) -> None:
    """After a commit inside the block nothing is restored, and no transaction is begun for it."""
    with muted(caller.connection), context(caller.connection, user_id=7):
        caller.commit()
    assert caller.idle()
    assert not caller.muted


def test_the_outer_block_does_not_come_back_in_a_later_transaction(caller: Caller) -> None:
    """A transaction begun inside nested blocks is not given what the outer one had set."""
    with context(caller.connection, user_id=7):
        with context(caller.connection, trace="a"):
            caller.commit()
            assert caller.context == {}
        assert caller.context == {}


def test_does_not_mask_the_error_that_aborted_the_transaction(caller: Caller) -> None:
    """The user's error passes through the end of the block as it is, and the silence is gone."""
    with pytest.raises(Exception, match="division by zero"), muted(caller.connection):
        caller.execute("SELECT 1/0")
    caller.rollback()
    assert not caller.muted


def test_swallowed_error_does_not_make_the_end_of_the_block_raise(caller: Caller) -> None:
    """A block may end while its transaction is aborted."""
    with muted(caller.connection), pytest.raises(Exception, match="division by zero"):
        caller.execute("SELECT 1/0")
    caller.rollback()
    assert not caller.muted


def test_rolled_back_savepoint_keeps_the_outer_silence(caller: Caller) -> None:
    """A savepoint made and rolled back inside the block changes nothing about it."""
    with muted(caller.connection):
        caller.execute("SAVEPOINT inside")
        with pytest.raises(Exception, match="division by zero"):
            caller.execute("SELECT 1/0")
        caller.execute("ROLLBACK TO SAVEPOINT inside")
        assert caller.muted
    assert not caller.muted


def test_survives_a_connection_that_dies(connection: Any) -> None:
    """A connection closed inside the block is no error of the block."""
    with muted(connection):
        connection.close()


@pytest.mark.parametrize("connect", [psycopg2.connect, psycopg.connect])
def test_needs_a_transaction_with_autocommit(connect: Callable[[str], Any], dsn: str) -> None:
    """In autocommit the setting would be gone at once, which is an error that says the fix."""
    with closing(connect(dsn)) as connection:
        connection.autocommit = True
        with pytest.raises(StateError, match="Begin one around the block"), muted(connection):
            pytest.fail("the block ran")
        caller = dbapi_caller(connection)
        caller.execute("BEGIN")
        with muted(connection):
            assert caller.muted
        assert not caller.muted


def test_needs_a_transaction_with_sqlalchemy(dsn: str) -> None:
    """The isolation level AUTOCOMMIT is refused for connections and sessions."""
    engine = sa.create_engine(driver_url(dsn, "psycopg2"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, orm.Session(engine) as session:
        for refused in (connection, session):
            with pytest.raises(StateError, match="AUTOCOMMIT"), muted(refused):
                pytest.fail("the block ran")
    engine.dispose()


def test_needs_atomic_with_django(dsn: str) -> None:
    """Outside ``atomic`` Django commits each statement, which is an error that says the fix."""
    with (
        django_connection(dsn) as connection,
        pytest.raises(StateError, match=r"transaction\.atomic"),
        muted(connection),
    ):
        pytest.fail("the block ran")


def test_works_in_atomic_with_djangos_own_connection(dsn: str) -> None:
    """``django.db.connection`` is taken as it is, and a rolled back ``atomic`` is no trouble."""
    with django_connection(dsn) as connection:
        caller = django_caller(connection)
        with atomic(), context(django.db.connection, user_id=7):
            assert caller.context == {"user_id": 7}
            with pytest.raises(KeyError), atomic(), muted(django.db.connection):
                raise KeyError
            assert not caller.muted
            assert caller.context == {"user_id": 7}


def test_session_flushes_at_both_ends(dsn: str) -> None:
    """The block covers the objects changed in it: none from before, and none is left for after."""
    base = orm.declarative_base()

    class Note(base):  # type: ignore[misc, valid-type]
        __tablename__ = "notes"
        id = sa.Column(sa.Integer, primary_key=True)
        muted = sa.Column(
            sa.Text, server_default=sa.text("current_setting('pgsignals.muted', true)")
        )

    engine = sa.create_engine(driver_url(dsn, "psycopg2"))
    base.metadata.create_all(engine)
    with orm.Session(engine) as session:
        session.add(Note(id=1))
        with muted(session):
            session.add(Note(id=2))
        session.add(Note(id=3))
        session.commit()
        found = session.scalars(sa.select(Note.muted).order_by(Note.id)).all()
    engine.dispose()
    assert [value == "on" for value in found] == [False, True, False]


def test_gives_dict_rows_no_trouble(dsn: str) -> None:
    """The connection's own cursor and row factories do not matter."""
    with (
        closing(psycopg2.connect(dsn, cursor_factory=psycopg2.extras.RealDictCursor)) as two,
        closing(psycopg.connect(dsn, row_factory=psycopg.rows.dict_row)) as three,
        closing(psycopg.connect(dsn, cursor_factory=psycopg.RawCursor)) as raw,
    ):
        for connection in (two, three, raw):
            with muted(connection), context(connection, user_id=7):
                pass


def test_context_says_what_json_can(connection: Any) -> None:
    """Dates and UUIDs arrive as strings, text as it is, and a field may have any name."""
    fields: dict[str, Any] = {
        "at": datetime(2026, 1, 2, tzinfo=timezone.utc),
        "id": UUID(int=1),
        "who": "Zoë 🦊 '\"\\ %s :p",
        "connection": [None, True, {"n": 1.5}],
    }
    with context(connection, **fields):
        assert dbapi_caller(connection).context == {
            "at": "2026-01-02T00:00:00Z",
            "id": "00000000-0000-0000-0000-000000000001",
            "who": "Zoë 🦊 '\"\\ %s :p",
            "connection": [None, True, {"n": 1.5}],
        }


@pytest.mark.parametrize("value", [object(), "\ud800"])
def test_context_refuses_what_json_cannot_say(connection: Any, value: object) -> None:
    """A value that cannot be written is refused by the name of its field."""
    with pytest.raises(ConfigurationError, match="broken"), context(connection, broken=value):
        pytest.fail("the block ran")


def test_context_is_bounded_in_bytes(connection: Any) -> None:
    """2,000 bytes travel; more is refused with the size, also when nested blocks add up to it."""
    largest = "x" * (2_000 - len('{"text":""}'))
    with (
        context(connection, text=largest),
        pytest.raises(ConfigurationError, match="2,006 bytes"),
        context(connection, a=1),
    ):
        pytest.fail("the block ran")
    with (
        pytest.raises(ConfigurationError, match="at most 2,000"),
        context(connection, text="ü" * 1_000),
    ):
        pytest.fail("the block ran")


@pytest.mark.parametrize("foreign", ["nonsense", "[1]", "7"])
def test_context_replaces_what_is_not_its_own(connection: Any, foreign: str) -> None:
    """A setting that somebody else made is put aside for the block, never an error of a write."""
    caller = dbapi_caller(connection)
    caller.execute(f"SET pgsignals.context = '{foreign}'")
    with context(connection, user_id=7):
        assert caller.context == {"user_id": 7}
    assert caller.setting("context") == foreign


def test_needs_no_superuser(connection: Any) -> None:
    """Any role may silence its own transaction."""
    caller = dbapi_caller(connection)
    caller.execute("CREATE ROLE pgsignals_nobody")
    caller.execute("SET LOCAL ROLE pgsignals_nobody")
    with muted(connection), context(connection, user_id=7):
        assert caller.muted
    connection.rollback()


@pytest.mark.parametrize("given", [None, "postgresql://me:secret@host/db", object()])
def test_refuses_what_is_no_connection(given: object) -> None:
    """Anything else is refused with the list of what is accepted, and without a password."""
    with pytest.raises(ConfigurationError, match="Give a psycopg2") as caught, muted(given):
        pytest.fail("the block ran")
    assert "secret" not in str(caught.value)


def test_refuses_other_databases() -> None:
    """A connection to something else than PostgreSQL is refused."""
    engine = sa.create_engine("sqlite://")
    with (
        engine.connect() as connection,
        pytest.raises(ConfigurationError, match="to PostgreSQL"),
        muted(connection),
    ):
        pytest.fail("the block ran")
    engine.dispose()


def test_refuses_asynchronous_connections(dsn: str) -> None:
    """Asynchronous connections are refused with the way that works."""
    from sqlalchemy.ext.asyncio import AsyncSession

    with closing(psycopg2.connect(dsn, async_=1)) as connection:
        psycopg2.extras.wait_select(connection)
        for given in (connection, AsyncSession()):
            with pytest.raises(ConfigurationError, match="run_sync"), muted(given):
                pytest.fail("the block ran")
