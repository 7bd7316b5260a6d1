"""``muted`` and ``context``: settings of a transaction that its triggers read.

PostgreSQL keeps both settings for one transaction. Here too is :func:`borrow`, through which a
connection of the user's is used, whatever library made it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import msgspec
import psycopg2.extensions

from ..core.errors import ConfigurationError, StateError

MAX_CONTEXT_BYTES = 2_000

_IN_TRANSACTION = psycopg2.extensions.TRANSACTION_STATUS_INTRANS

# The first words of messages that say the same to those who read rows from the write-ahead log.
MUTED_MESSAGE, CONTEXT_MESSAGE = "muted", "context"

_MUTED, _CONTEXT = "pgsignals.muted", "pgsignals.context"

_READ = "SELECT coalesce(pg_catalog.current_setting(%s, true), '')"
# Triggers read the setting. A transaction's rows in the write-ahead log do not show it, so that a
# message says the same there, in its place among the rows.
_WRITE = (
    "SELECT pg_catalog.set_config(%s, %s, true),"
    " CASE WHEN pg_catalog.current_setting('wal_level') = 'logical'"
    " AND NOT pg_catalog.pg_is_in_recovery()"
    " THEN pg_catalog.pg_logical_emit_message(true, 'pgsignals', %s) END"
)
# Only if the block's value is still set: after a commit inside the block it is gone, and the outer
# value would be brought into a transaction that it was not made for.
_RESTORE = _WRITE + " WHERE pg_catalog.current_setting(%s, true) = %s"


def muted(connection: object, /) -> AbstractContextManager[None]:
    """Silence the watchers for what the connection's transaction writes inside the block.

    ``connection`` is a psycopg2 or psycopg connection, an SQLAlchemy Session, scoped_session or
    Connection, or a Django connection. A Session is flushed at both ends, so that the block
    silences the changes made in it and nothing else.

    The silence ends with the block or with the transaction, whichever comes first: after a commit
    inside the block, the rest of the block is heard. A rollback to a savepoint brings back the
    setting of the moment when the savepoint was made.

    Raises ConfigurationError for anything else than such a connection, and StateError where no
    transaction is open and none would be opened (autocommit).
    """
    return _set_locally(connection, _MUTED, lambda outer: "on")


def context(connection: object, /, **fields: object) -> AbstractContextManager[None]:
    """Send ``fields`` along, as ``event.context``, with changes that are made inside the block.

    A nested block adds its fields to the outer one's. Values are those that JSON has: strings,
    numbers, booleans, None, lists and mappings; dates, UUIDs and decimals arrive as strings.
    The context lasts as long as the silence of :func:`muted`, for the same kinds of connections.

    Raises what :func:`muted` raises, and ConfigurationError for values that JSON does not have, or
    that take more than 2,000 bytes in all.
    """
    return _set_locally(connection, _CONTEXT, lambda outer: _merge(outer, fields))


@contextmanager
def _set_locally(connection: object, name: str, inner: Callable[[str], str]) -> Iterator[None]:
    borrowed = borrow(connection)
    if borrowed is None:
        raise ConfigurationError(refusal(connection))
    if borrowed.autocommits():
        raise StateError(
            f"{name} lasts for a transaction, and this connection has none: it commits each "
            f"statement by itself. Begin one around the block: {borrowed.remedy}."
        )
    borrowed.flush()
    outer = borrowed.execute(_READ, [name])[0][0]
    value = inner(outer)
    word = MUTED_MESSAGE if name == _MUTED else CONTEXT_MESSAGE
    borrowed.execute(_WRITE, [name, value, f"{word} {value}"])
    try:
        yield
        if borrowed.in_transaction():
            borrowed.flush()
    finally:
        # If the statement fails, the transaction has ended, and the setting with it.
        with suppress(Exception):
            if borrowed.in_transaction():
                borrowed.execute(_RESTORE, [name, outer, f"{word} {outer}", name, value])


def _merge(outer: str, fields: Mapping[str, object]) -> str:
    try:
        known = msgspec.json.decode(outer, type=dict[str, Any])
    except msgspec.DecodeError:  # unset, or set by somebody else to something of their own
        known = {}
    try:
        text = msgspec.json.encode({**known, **fields})
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigurationError(
            f"The context {', '.join(fields)} cannot be written as JSON: {error}. Give strings, "
            "numbers, booleans, None, dates, UUIDs, and lists and mappings of them."
        ) from error
    if len(text) > MAX_CONTEXT_BYTES:
        raise ConfigurationError(
            f"The context {', '.join({**known, **fields})} takes {len(text):,} bytes as JSON; at "
            f"most {MAX_CONTEXT_BYTES:,} travel with an event. Give an id, and keep the rest in a "
            "table."
        )
    return text.decode()


def refusal(connection: object) -> str:
    """Return the message for a connection that cannot be used."""
    classes = type(connection).__mro__
    asynchronous = getattr(connection, "async_", False) or any(
        "async" in f"{cls.__module__}.{cls.__name__}".lower() for cls in classes
    )
    return (
        f"A {type(connection).__name__} is not a connection that can be used here. Give a psycopg2 "
        "or psycopg connection, an SQLAlchemy Session, scoped_session or Connection, or a Django "
        "connection, to PostgreSQL."
        + (
            " Asynchronous ones cannot be used as they are; with SQLAlchemy, use the block inside "
            "`await session.run_sync(...)`."
            if asynchronous
            else ""
        )
    )


class Borrowed:
    """A connection of the user's, used inside their transaction. Nothing is ever committed.

    Queries have ``%s`` for each parameter, at least one, and ``%%`` for a percent sign.
    """

    remedy = ""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def execute(self, query: str, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        """Run a query and return its rows."""
        with self._cursor() as cursor:
            cursor.execute(query, tuple(parameters))
            return [tuple(row) for row in cursor.fetchall()]

    def autocommits(self) -> bool:
        """Whether a statement would be a transaction of its own."""
        driver = self.driver()
        return bool(getattr(driver, "autocommit", False)) and _status(driver) != _IN_TRANSACTION

    def in_transaction(self) -> bool:
        """Whether a transaction is open in which statements can still be run."""
        return _status(self.driver()) in (_IN_TRANSACTION, None)

    def flush(self) -> None:
        """Send the changes that the library holds back to the database."""

    def driver(self) -> Any:
        """Return the connection that the library wraps; None if it is not made yet."""
        return self.connection

    def _cursor(self) -> Any:
        raise NotImplementedError


class _Psycopg2(Borrowed):
    remedy = "set connection.autocommit to False"

    def _cursor(self) -> Any:
        # Made directly, here and for psycopg: the user's own cursor class may return anything.
        return psycopg2.extensions.cursor(self.connection)


class _Psycopg(Borrowed):
    remedy = "use `with connection.transaction():`"

    def _cursor(self) -> Any:
        psycopg: Any = sys.modules["psycopg"]
        return psycopg.Cursor(self.connection, row_factory=psycopg.rows.tuple_row)


class _SQLAlchemy(Borrowed):
    remedy = "use an engine or Connection whose isolation_level is not AUTOCOMMIT"

    def __init__(self, connection: Any, flush: Callable[[], None] | None = None) -> None:
        super().__init__(connection)
        self._flush = flush

    def execute(self, query: str, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        statement = sys.modules["sqlalchemy"].text(named(query))
        return [
            tuple(row) for row in self.connection.execute(statement, name_parameters(parameters))
        ]

    def in_transaction(self) -> bool:
        connection = self.connection
        # In this order: `connection.connection` would open a new one if the old is gone.
        return (
            not connection.closed
            and not connection.invalidated
            and connection.in_transaction()
            and super().in_transaction()
        )

    def flush(self) -> None:
        if self._flush is not None:
            self._flush()

    def driver(self) -> Any:
        return self.connection.connection.dbapi_connection


class _Django(Borrowed):
    remedy = "use `with transaction.atomic():`"

    def autocommits(self) -> bool:
        return not self.connection.in_atomic_block and self.connection.get_autocommit()

    def in_transaction(self) -> bool:
        connection = self.connection
        return bool(
            connection.connection is not None
            and not connection.needs_rollback
            and super().in_transaction()
        )

    def driver(self) -> Any:
        return self.connection.connection

    def _cursor(self) -> Any:
        return self.connection.cursor()


def borrow(connection: object) -> Borrowed | None:
    """Return the user's connection, ready to be used; None if it is of no usable kind.

    No library is imported for this: a connection of it can only be there if it has been.
    """
    if isinstance(connection, psycopg2.extensions.connection):
        return None if connection.async_ else _Psycopg2(connection)
    psycopg = sys.modules.get("psycopg")
    if psycopg is not None and isinstance(connection, psycopg.Connection):
        return _Psycopg(connection)
    return _borrow_from_sqlalchemy(connection) or _borrow_from_django(connection)


def _borrow_from_sqlalchemy(connection: Any) -> Borrowed | None:
    sqlalchemy = sys.modules.get("sqlalchemy")
    orm = sys.modules.get("sqlalchemy.orm")
    flush = None
    if orm is not None and isinstance(connection, orm.scoped_session):
        connection = connection()
    if orm is not None and isinstance(connection, orm.Session):
        flush = connection.flush
        connection = connection.connection()
    if sqlalchemy is None or not isinstance(connection, sqlalchemy.Connection):
        return None
    return _SQLAlchemy(connection, flush) if connection.dialect.name == "postgresql" else None


def _borrow_from_django(connection: Any) -> Borrowed | None:
    if not is_django_connection(connection) or connection.vendor != "postgresql":
        return None
    return _Django(connection)


def is_django_connection(connection: object) -> bool:
    """Whether the connection is ``django.db.connection`` or one of ``django.db.connections``."""
    backends = sys.modules.get("django.db.backends.base.base")
    proxies = sys.modules.get("django.utils.connection")
    return (
        backends is not None
        and proxies is not None
        and isinstance(connection, (backends.BaseDatabaseWrapper, proxies.ConnectionProxy))
    )


def named(query: str) -> str:
    """Return a query for :class:`Borrowed` with ``:p0``, ``:p1``, …, for ``sqlalchemy.text``."""
    number = iter(range(query.count("%")))
    return re.sub(
        "%[s%]",
        lambda found: f":p{next(number)}" if found[0] == "%s" else "%",
        query.replace(":", r"\:"),
    )


def name_parameters(parameters: Sequence[object]) -> dict[str, object]:
    """Return the parameters for a query by :func:`named`."""
    return {f"p{number}": value for number, value in enumerate(parameters)}


def _status(driver: Any) -> int | None:
    """Return the transaction's status in libpq's numbers; None if the driver does not tell."""
    info = getattr(driver, "info", None)
    return getattr(info, "transaction_status", None)
