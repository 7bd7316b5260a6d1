"""psycopg2 connections: connecting, sessions that never block for ever."""

from __future__ import annotations

import contextlib
import os
import re
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import psycopg2
import psycopg2.extensions
import psycopg2.extras
from psycopg2 import sql
from psycopg2.extensions import POLL_OK, POLL_WRITE, Notify
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from .backoff import Backoff as Backoff
from .errors import ConfigurationError, ConnectError
from .payload import Cast

# Up to the last @, because a password may hold an @ that should have been written as %40.
_URL_SECRET = re.compile(r"(://[^/?#@:\s]*):\S*@")
# A user alone is a token there.
_URL_TOKEN = re.compile(r"(\bnats://)[^/?#@:\s]+@", re.IGNORECASE)
_URL_PARAMETER = re.compile(r"([?&](?:ssl)?password=)[^&#\s]*", re.IGNORECASE)
# In a connection string, and in the repr of a mapping.
_SECRETS = re.compile(
    r"(password)['\"]?\s*[=:]\s*('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S+)", re.IGNORECASE
)


def redact(text: str) -> str:
    """``text`` without the passwords of any connection string in it."""
    text = _URL_SECRET.sub(r"\1:***@", text)
    text = _URL_TOKEN.sub(r"\1***@", text)
    text = _URL_PARAMETER.sub(r"\1***", text)
    return _SECRETS.sub(r"\1=***", text)


_SHOWN = ("service", "host", "hostaddr", "port", "dbname", "user")
# A password with characters that should have been percent-encoded: it ends before an @, and libpq
# takes what follows the first such character for the host, the port or the database.
_URL_PASSWORD = re.compile(r"\s*postgres(?:ql)?://[^:/?#@]*:(.*)@", re.DOTALL)


def display(dsn: str) -> str:
    """Where a connection string leads, for messages: no more of it than what is no secret.

    It shows nothing of a string in which something else may turn out to be the password.
    """
    given = _legible(libpq_dsn(dsn))
    if given is None:
        return "the given DSN"
    shown = " ".join(f"{name}={given[name]}" for name in _SHOWN if name in given)
    return redact(shown) or "the default of libpq"


def _legible(dsn: str) -> dict[str, str] | None:
    """The parts of a connection string, unless libpq sees other parts in it than its author."""
    try:
        given: dict[str, str] = psycopg2.extensions.parse_dsn(dsn)
    except (psycopg2.Error, UnicodeError):
        return None
    password = _URL_PASSWORD.match(dsn)
    if password is not None and re.search(r"[/?#@]", password[1]):
        return None
    return given if re.fullmatch(r"[\d,]*", given.get("port", "")) else None


class Engine(Protocol):
    """What :func:`dsn_of` needs of an SQLAlchemy Engine or AsyncEngine."""

    @property
    def url(self) -> Any:
        """Where it leads."""

    @property
    def dialect(self) -> Any:
        """Of what database it is, and through which driver."""


# What the drivers that are not made of libpq call these.
_LIBPQ_NAMES = {"database": "dbname", "ssl": "sslmode"}
_PORTABLE = ("host", "port", "dbname", "user", "password", "sslmode")


def dsn_of(given: str | Engine) -> str:
    """A connection string: as it is given, or what an SQLAlchemy engine's URL says.

    What an engine got as ``connect_args`` or ``creator`` is not in its URL.
    Raises ConfigurationError for anything else, and for an engine of another database.
    """
    if isinstance(given, str):
        return given
    dialect, url = getattr(given, "dialect", None), getattr(given, "url", None)
    name = getattr(dialect, "name", None)
    if dialect is None or url is None or name is None:
        hint = " Watchers come after it: start(watchers=[…])." if isinstance(given, list) else ""
        raise ConfigurationError(
            f"dsn={redact(repr(given))}: give a connection string, '' for libpq's defaults, or an "
            f"SQLAlchemy Engine or AsyncEngine.{hint}"
        )
    if name != "postgresql":
        raise ConfigurationError(f"The engine is of {name}: give one of PostgreSQL.")
    _, parameters = dialect.create_connect_args(url)
    parts = {_LIBPQ_NAMES.get(key, key): value for key, value in parameters.items()}
    if dialect.driver not in ("psycopg2", "psycopg", "psycopg_async", "psycopg2cffi"):
        parts = {key: parts[key] for key in _PORTABLE if key in parts}
    return psycopg2.extensions.make_dsn(
        **{
            key: ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            for key, value in parts.items()
            # Anything else is an object for the driver alone.
            if isinstance(value, str | int | list | tuple)
        }
    )


def libpq_dsn(dsn: str) -> str:
    """A connection string as libpq takes it: SQLAlchemy's ``postgresql+driver://`` works too."""
    return re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", dsn)


def _options(dsn: str, timeout: float) -> dict[str, Any]:
    """What we add to the user's connection string where it leaves it open."""
    defaults = {
        "connect_timeout": max(2, round(timeout)),
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
        "fallback_application_name": "pgsignals",
    }
    given = psycopg2.extensions.parse_dsn(dsn)
    return {name: value for name, value in defaults.items() if name not in given} | {
        "client_encoding": "UTF8"
    }


class _Cursor(Cursor):
    """Gives up a statement that gets no answer: a silent server would hold it for ever."""

    patience: float

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002
        given_up = threading.Event()
        with socket.socket(fileno=os.dup(self.connection.fileno())) as line:

            def give_up() -> None:
                given_up.set()
                # The server may have closed it at the same moment.
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

            timer = threading.Timer(self.patience, give_up)
            timer.daemon, timer.name = True, "pgsignals-patience"
            timer.start()
            try:
                super().execute(query, vars)
            except psycopg2.Error:
                if not given_up.is_set():
                    raise
            finally:
                timer.cancel()
                timer.join()
        if given_up.is_set():
            raise psycopg2.OperationalError(
                f"the server did not answer a statement within {self.patience:g} s"
            )


def connect(dsn: str, timeout: float = 10.0, patience: float = 60.0) -> Connection:
    """An ordinary, blocking connection in autocommit mode.

    Raises ConnectError, whose message carries no password, when there is none in ``timeout``
    seconds. A statement has ``patience`` seconds, or it fails and the connection is broken.
    """
    factory = type("_PatientCursor", (_Cursor,), {"patience": patience})
    dsn = libpq_dsn(dsn)
    try:
        connection: Connection = psycopg2.connect(
            dsn, cursor_factory=factory, **_options(dsn, timeout)
        )
    except (psycopg2.Error, UnicodeError) as error:
        failure = _connect_error(dsn, error)
    else:
        connection.autocommit = True
        return connection
    # Outside the handler: psycopg2's error may quote the password, and would stay its __context__.
    raise failure


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
    ("database .* does not exist|no such database", "there is no such database on that server"),
    ("role .* does not exist", "there is no such role on that server"),
    ("starting up|shutting down|not accepting connections", "the server is not ready yet"),
    (
        "hot standby mode|session is (?:not )?read-only",
        "no host of the DSN is what its target_session_attrs asks for",
    ),
    (
        "unsupported startup parameter",
        "PgBouncer lets no such parameter pass: see its ignore_startup_parameters",
    ),
)


def _connect_error(dsn: str, error: Exception) -> ConnectError:
    text = str(error).strip()
    cause = next((f": {meaning}" for pattern, meaning in _CAUSES if re.search(pattern, text)), "")
    given = _legible(dsn)
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


def make_cast(connection: Connection) -> Cast:
    """Python values as queries of ``connection`` give them, and ``uuid.UUID`` for uuid.

    psycopg2's casters crash the interpreter when they are given no cursor, hence one that is kept
    as long as the function. It stays usable when its connection is closed.
    """
    cursor = connection.cursor()
    psycopg2.extras.register_uuid(conn_or_curs=cursor)  # type: ignore[no-untyped-call]
    own: dict[int, Callable[[str, Any], Any]] = cursor.string_types or {}
    everywhere = psycopg2.extensions.string_types
    default = psycopg2.extensions.UNICODE

    def cast(oid: int, text: str) -> Any:
        caster = own.get(oid) or everywhere.get(oid) or default
        return caster(text, cursor)

    return cast


# Where there is no poll(), Windows for one, there are no flags for it either.
_READABLE: int = getattr(select, "POLLIN", 1)
_WRITABLE: int = getattr(select, "POLLOUT", 4)


class _Selector:
    """``poll()`` for a platform, or under a library, that has none."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, descriptor: int, flags: int) -> None:
        """As of ``select.poll``."""
        event = selectors.EVENT_WRITE if flags == _WRITABLE else selectors.EVENT_READ
        self._selector.register(descriptor, event)

    def unregister(self, descriptor: int) -> None:
        """As of ``select.poll``."""
        self._selector.unregister(descriptor)

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        """As of ``select.poll``."""
        seconds = None if timeout is None else timeout / 1000
        return [(key.fd, events) for key, events in self._selector.select(seconds)]


class Waiter:
    """Waits for a socket, and can be woken by any thread.

    By ``poll()``, since ``select()`` refuses descriptors beyond 1,024. ``selectors`` would do, but
    takes as long by itself as all else that a wait is.
    """

    def __init__(self) -> None:
        self._poll: Any = select.poll() if hasattr(select, "poll") else _Selector()
        self._awake, self._alarm = socket.socketpair()
        self._awake.setblocking(False)
        self._alarm.setblocking(False)
        self._awake_number = self._awake.fileno()
        self._poll.register(self._awake_number, _READABLE)
        self._watched: int | None = None
        self._writable = False

    def wait(self, descriptor: int | None, timeout: float | None, write: bool = False) -> bool:
        """Wait until ``descriptor`` can be read (or written), or for a wake-up or the time.

        Returns whether it can.
        """
        if descriptor != self._watched or write != self._writable:
            self.forget()
            if descriptor is not None:
                self._poll.register(descriptor, _WRITABLE if write else _READABLE)
                self._watched, self._writable = descriptor, write
        usable = False
        # A negative time would be for ever; a part of a millisecond is rounded up.
        for number, _ in self._poll.poll(None if timeout is None else max(0.0, 1000 * timeout)):
            if number == self._awake_number:
                self._drain()
            else:
                usable = True
        return usable

    def forget(self) -> None:
        """Leave the descriptor alone; to be called before it is closed."""
        if self._watched is not None:
            self._poll.unregister(self._watched)
            self._watched, self._writable = None, False

    def sleep(self, seconds: float, until: Callable[[], bool]) -> None:
        """Sleep for ``seconds``, or until woken with ``until()`` true."""
        deadline = time.monotonic() + seconds
        while not until() and (left := deadline - time.monotonic()) > 0:
            self.wait(None, left)

    def wake(self) -> None:
        """End the wait, or the next one if none is under way."""
        # A full buffer holds wake-ups enough, and who has closed this waits no more.
        with contextlib.suppress(OSError):
            self._alarm.send(b"\0")

    def close(self) -> None:
        """Give the descriptors back."""
        self._awake.close()
        self._alarm.close()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._awake.recv(4096):
                pass


class Session:
    """A connection for listening that never blocks for longer than it is told.

    psycopg2's asynchronous mode: a server that goes silent in the middle of a statement would hold
    a blocking connection for ever. It commits each statement by itself.
    """

    def __init__(self, dsn: str, waiter: Waiter, cancelled: Callable[[], bool]) -> None:
        self._waiter = waiter
        self._cancelled = cancelled
        self._dsn = libpq_dsn(dsn)
        self._connection: Connection | None = None
        self._any_bytes = False
        self._encrypted = False
        self._cursor: Cursor

    def open(self, timeout: float, encoding: str = "UTF8") -> None:
        """Connect within ``timeout`` seconds, or raise ConnectError.

        A database whose ``encoding`` is SQL_ASCII holds any bytes, and the server ends the session
        that asks for UTF-8 when other ones come: those are replaced here.
        """
        self._any_bytes = encoding == "SQL_ASCII"
        try:
            options = _options(self._dsn, timeout)
            if self._any_bytes:
                options["client_encoding"] = "LATIN1"
            self._connection = psycopg2.connect(self._dsn, async_=True, **options)
            self._finish(time.monotonic() + timeout)
            self._encrypted = self._connection.info.ssl_in_use
        except (psycopg2.Error, TimeoutError, UnicodeError) as error:
            failure = _connect_error(self._dsn, error)
        else:
            return
        self.close()
        # Outside the handler, as in connect().
        raise failure

    def execute(
        self,
        statement: str | sql.Composable,
        parameters: Sequence[Any] | None = None,
        *,
        timeout: float,
    ) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows.

        Raises psycopg2.Error, and TimeoutError when it takes longer than ``timeout`` seconds.
        """
        self.send(statement, parameters)
        self._finish(time.monotonic() + timeout)
        cursor = self._cursor
        return cursor.fetchall() if cursor.description else []

    def send(
        self, statement: str | sql.Composable, parameters: Sequence[Any] | None = None
    ) -> None:
        """Begin a statement without waiting for its end, which ``receive`` takes note of."""
        # Kept, because the connection refers to it weakly: were it collected before the answer
        # comes, poll() would fail with "the asynchronous cursor has disappeared".
        self._cursor = self._live.cursor()
        self._cursor.execute(statement, parameters)

    def receive(self) -> list[Notify]:
        """The notifications that have arrived, without waiting.

        Over TLS, one poll may bring one notification of several that the socket no longer shows:
        call it until it returns none, unless the session is ``plain``.
        """
        connection = self._live
        connection.poll()
        arrived: list[Notify] = connection.notifies
        if arrived:
            connection.notifies = []
        if not self._any_bytes:
            return arrived
        return [Notify(each.pid, each.channel, _in_utf8(each.payload)) for each in arrived]

    def text(self, value: str) -> str:
        """A text that a statement returned, as it should be where the database holds any bytes."""
        return _in_utf8(value) if self._any_bytes else value

    @property
    def plain(self) -> bool:
        """Whether there is no TLS, so that the socket shows all that ``receive`` has not read."""
        return not self._encrypted

    def wait(self, timeout: float | None) -> bool:
        """Wait for something to arrive; whether it has, rather than a wake-up or the time."""
        return self._waiter.wait(self._live.fileno(), timeout)

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._waiter.forget()
            connection.close()

    def abandon(self) -> None:
        """In the child of a fork: drop the socket without the goodbye that close() would send.

        The server would take it for the parent's and end the parent's session.
        """
        if self._connection is not None:
            os.close(self._connection.fileno())
            self._connection = None

    @property
    def _live(self) -> Connection:
        if self._connection is None:
            raise psycopg2.InterfaceError("the session is closed")
        return self._connection

    def _finish(self, deadline: float) -> None:
        connection = self._live
        while (state := connection.poll()) != POLL_OK:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timeout expired: the server does not answer")
            if self._cancelled():
                raise TimeoutError("stopped while waiting for the server")
            # On its way to the next host, libpq opens another socket under the same number.
            self._waiter.forget()
            self._waiter.wait(connection.fileno(), left, write=state == POLL_WRITE)


def _in_utf8(text: str) -> str:
    return text.encode("latin-1").decode("utf-8", "replace")
