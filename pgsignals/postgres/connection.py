"""Blocking psycopg2 connections, whose statements never wait for ever."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import sql
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from ..core.errors import ConnectError
from ..core.logging import log
from ..core.payload import Cast
from ..core.redaction import redact
from ..core.threads import Thread
from .dsn import display, legible_parts, libpq_dsn, libpq_options, malformed
from .session_settings import preamble


class _Cursor(Cursor):
    """Gives up a statement without an answer; otherwise a silent server would hold it for ever."""

    patience: float
    preamble_length = 0

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002
        self.preamble_length = 0
        if self.connection.info.transaction_status == TRANSACTION_STATUS_IDLE:
            # In one message with the statement, so that both are, or begin, one transaction.
            before = preamble(self.connection.server_version)
            self.preamble_length = len(before)
            query = before + query if isinstance(query, str) else sql.SQL(before) + query
        self._execute(query, vars)

    def _execute(self, query: Any, vars: Any) -> None:  # noqa: A002
        done, given_up = threading.Event(), threading.Event()
        with socket.socket(fileno=os.dup(self.connection.fileno())) as line:

            def give_up() -> None:
                if done.wait(self.patience):
                    return
                given_up.set()
                # The server may have closed it at the same moment.
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

            timer = Thread("patience", give_up)
            try:
                timer.start()
                super().execute(query, vars)
            except psycopg2.Error:
                if not given_up.is_set():
                    raise
            finally:
                done.set()
                timer.join()
        if given_up.is_set():
            raise psycopg2.OperationalError(
                f"the server did not answer a statement within {self.patience:g} s"
            )


def connect(dsn: str, timeout: float = 10.0, patience: float = 60.0) -> Connection:
    """Return an ordinary, blocking connection in autocommit mode.

    Raises ConnectError, whose message carries no password, if there is no connection within
    ``timeout`` seconds. A statement that takes longer than ``patience`` seconds fails, and breaks
    the connection.
    """
    _warn_of_greenlets()
    factory = type("_PatientCursor", (_Cursor,), {"patience": patience})
    dsn = libpq_dsn(dsn)
    try:
        connection: Connection = psycopg2.connect(
            dsn, cursor_factory=factory, **libpq_options(dsn, timeout)
        )
    except (psycopg2.Error, UnicodeError) as error:
        failure = connect_error(dsn, error)
    else:
        connection.autocommit = True
        return connection
    # Outside the handler: psycopg2's error may quote the password, and would stay its __context__.
    raise failure


@contextlib.contextmanager
def opened(dsn: str, timeout: float = 10.0, patience: float = 60.0) -> Iterator[Cursor]:
    """Open a connection by :func:`connect`, yield a cursor of it, and close it in the end."""
    connection = connect(dsn, timeout, patience)
    with contextlib.closing(connection), connection.cursor() as cursor:
        yield cursor


@contextlib.contextmanager
def transaction(cursor: Cursor, opening: Sequence[str] = ()) -> Iterator[None]:
    """Run a transaction on a connection in autocommit mode.

    The statements ``opening`` begin it, in one message with BEGIN.
    """
    try:
        cursor.execute("; ".join(["BEGIN", *opening]))
        yield
    except BaseException:
        if not cursor.connection.closed:
            cursor.execute("ROLLBACK")
        raise
    cursor.execute("COMMIT")


@functools.cache
def _warn_of_greenlets() -> None:
    """Warn once if psycopg2 would stop all greenlets of a thread while it waits."""
    gevent: Any = sys.modules.get("gevent.monkey")
    eventlet: Any = sys.modules.get("eventlet.patcher")
    patched = (gevent is not None and gevent.is_module_patched("socket")) or (
        eventlet is not None and eventlet.is_monkey_patched("socket")
    )
    if patched and psycopg2.extensions.get_wait_callback() is None:
        log.warning(
            "psycopg2 stops all greenlets while it waits for the server: call patch_psycopg() of "
            "psycogreen.gevent, or of psycogreen.eventlet, before start()"
        )


_CAUSES = (
    # The connection string.
    ('missing "="', "a part of it has no \"=\": put a value with blanks between ''"),
    ("unterminated quoted string", "the quotes around one of its values do not end"),
    ("invalid percent-encoded|forbidden value %00", "a % in it has to be written as %25"),
    ("invalid connection option|invalid URI query parameter", "it has an unknown option"),
    ("invalid integer value|invalid port number", "its port is not a number from 1 to 65535"),
    ("codec can't encode", "it has characters that UTF-8 does not have"),
    ("invalid dsn", "it is malformed"),
    ("definition of service .* not found", "no service file defines this service"),
    # The way there.
    ("could not translate host name", "the host name is not known"),
    ("Connection refused", "nothing listens there: start PostgreSQL, or correct the port"),
    ("No such file or directory", "no server has its socket there: start it, or correct the path"),
    ("timeout expired", "the server does not answer: look for a firewall, or correct the address"),
    # TLS.
    ("does not support SSL", "the server offers no TLS: use another sslmode, or configure it"),
    (
        "certificate verify failed|root certificate file|does not match host name",
        "the server's certificate is not trusted: see sslrootcert",
    ),
    # The server.
    ("no password supplied", "the server asks for a password: put one into the DSN or ~/.pgpass"),
    (
        "(?:password|SASL) authentication failed|no such user",
        "the user or the password is wrong",
    ),
    ("no pg_hba.conf entry", "the server's pg_hba.conf does not let this user in from here"),
    (
        "too many clients|too many connections|connection slots|no more connections allowed",
        "the server has no connection left: see max_connections and CONNECTION LIMIT",
    ),
    (
        'exceeds "?max_wal_senders',
        "the server has no WAL sender left: see max_wal_senders",
    ),
    (
        "replication role to start walsender|permission denied to start WAL sender",
        "this role may not read the WAL: it needs ALTER ROLE … REPLICATION",
    ),
    ("database .* does not exist|no such database", "there is no such database on that server"),
    ("role .* does not exist", "there is no such role on that server"),
    ("starting up|shutting down|not accepting connections", "the server is not ready yet"),
    (
        "hot standby mode|session is (?:not )?read-only",
        "no host of the DSN is what its target_session_attrs asks for",
    ),
    (
        "unsupported startup parameter: replication",
        "the WAL cannot be read through this pooler: give the server's own address",
    ),
    (
        "unsupported startup parameter",
        "PgBouncer lets no such parameter pass: see its ignore_startup_parameters",
    ),
)


def connect_error(dsn: str, error: Exception) -> ConnectError:
    """Return the error for a failed connection, whose message carries no password."""
    text = str(error).strip()
    cause = next((f": {meaning}" for pattern, meaning in _CAUSES if re.search(pattern, text)), "")
    given = legible_parts(dsn)
    if given is None and (wrong := malformed(dsn, text)) is not None:
        return ConnectError(f"Cannot connect to PostgreSQL at the given DSN: {wrong}.")
    if given is None:
        # libpq quotes what it did not understand, and that may be the password.
        text = (
            "A password in a URL has @ : / ? # % written as %40 %3A %2F %3F %23 %25; the error of "
            "libpq is left out here, since it may show a part of the password."
        )
    elif given.get("password") == "***" and "authentication failed" in text:
        cause = (
            ": the password is wrong, since it is ***, with which SQLAlchemy shows a URL: "
            "URL.render_as_string() gives the password too when its hide_password is off"
        )
    return ConnectError(f"Cannot connect to PostgreSQL at {display(dsn)}{cause}. {redact(text)}")


def _read_uuid(text: Any, cursor: Any) -> uuid.UUID | None:
    return None if text is None else uuid.UUID(text)


_UUID = psycopg2.extensions.new_type((2950,), "UUID", _read_uuid)
_UUIDS = psycopg2.extensions.new_array_type((2951,), "UUID[]", _UUID)


def _read_bytes(text: Any, cursor: Any) -> bytes | None:
    # As bytes, which can be pickled, and not as a memoryview.
    return None if text is None else bytes(psycopg2.BINARY(text, cursor))


_BYTES = psycopg2.extensions.new_type((17,), "BYTES", _read_bytes)
_BYTES_ARRAY = psycopg2.extensions.new_array_type((1001,), "BYTES[]", _BYTES)

_INTERVAL_OID = 1186
# Since PostgreSQL 17 there are infinite intervals, in which psycopg2 finds no number, and so reads
# them as 0; its documentation has them as these limits, as it has infinite dates.
_INFINITE = {"infinity": timedelta.max, "-infinity": timedelta.min}


def _read_interval(text: Any, cursor: Any) -> Any:
    infinite = _INFINITE.get(text)
    if infinite is not None:
        return infinite
    # Which may be one of the program's own.
    caster: Callable[[Any, Any], Any] = psycopg2.extensions.string_types[_INTERVAL_OID]
    return caster(text, cursor)


_INTERVAL = psycopg2.extensions.new_type((_INTERVAL_OID,), "INTERVAL", _read_interval)
_INTERVALS = psycopg2.extensions.new_array_type((1187,), "INTERVAL[]", _INTERVAL)


def make_cast(connection: Connection) -> Cast:
    """Return a function that makes the Python values of ``connection``'s queries from texts.

    It gives ``uuid.UUID`` for uuid, ``bytes`` for bytea, and the limits of timedelta for infinite
    intervals. It keeps a
    cursor, without which psycopg2's casters would crash the interpreter, and stays usable when the
    connection is closed.
    """
    cursor = connection.cursor()
    # Not by register_uuid(), which decides for the whole program how UUIDs become parameters.
    for kind in (_UUID, _UUIDS, _INTERVAL, _INTERVALS, _BYTES, _BYTES_ARRAY):
        psycopg2.extensions.register_type(kind, cursor)
    own: dict[int, Callable[[str, Any], Any]] = cursor.string_types or {}
    everywhere = psycopg2.extensions.string_types
    default = psycopg2.extensions.UNICODE

    def cast(oid: int, text: str) -> Any:
        caster = own.get(oid) or everywhere.get(oid) or default
        return caster(text, cursor)

    return cast
