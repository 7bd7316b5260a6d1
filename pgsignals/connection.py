"""psycopg2 connections for listening: connecting, waiting, backing off."""

from __future__ import annotations

import contextlib
import random
import re
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

import psycopg2
import psycopg2.extensions
import psycopg2.extras
from psycopg2.extensions import connection as Connection

from .errors import ConnectError
from .payload import Cast

_SECRETS = re.compile(r"(password|sslpassword)\s*=\s*('(?:[^'\\]|\\.)*'|\S+)", re.IGNORECASE)
_URL_SECRET = re.compile(r"(://[^/?#@:]*):[^/?#@]*@")
_URL_PARAMETER = re.compile(r"([?&](?:ssl)?password=)[^&#]*", re.IGNORECASE)


def redact(text: str) -> str:
    """``text`` without the passwords of any connection string in it."""
    text = _URL_SECRET.sub(r"\1:***@", text)
    text = _URL_PARAMETER.sub(r"\1***", text)
    return _SECRETS.sub(r"\1=***", text)


def libpq_dsn(dsn: str) -> str:
    """A connection string as libpq takes it: SQLAlchemy's ``postgresql+driver://`` works too."""
    return re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", dsn)


def connect(dsn: str, *, application_name: str = "pgsignals", timeout: int = 10) -> Connection:
    """A connection in autocommit mode.

    Raises ConnectError, whose message carries no password.
    """
    options: dict[str, Any] = {
        "connect_timeout": timeout,
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
        "fallback_application_name": application_name,
        "client_encoding": "UTF8",
    }
    dsn = libpq_dsn(dsn)
    try:
        given = psycopg2.extensions.parse_dsn(dsn)
        defaults = {name: value for name, value in options.items() if name not in given}
        connection: Connection = psycopg2.connect(dsn, **{**defaults, "client_encoding": "UTF8"})
    except psycopg2.Error as error:
        raise ConnectError(
            f"Cannot connect to PostgreSQL at {redact(dsn) or 'the default of libpq'}: "
            f"{redact(str(error)).strip()}"
        ) from None
    connection.autocommit = True
    return connection


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


class Backoff:
    """Pauses between tries to connect: exponential, with full jitter."""

    def __init__(self, first: float = 0.1, most: float = 30.0) -> None:
        self._first = first
        self._most = most
        self._tries = 0

    def next(self) -> float:
        """Seconds to wait before the next try."""
        bound = min(self._most, self._first * 2**self._tries)
        self._tries = min(self._tries + 1, 32)
        return random.uniform(0, bound)

    def reset(self) -> None:
        """Start again from the first pause, since the connection has proved healthy."""
        self._tries = 0


class Waiter:
    """Waits for a socket, and can be woken by any thread.

    It uses what ``selectors`` finds best, so that descriptors beyond 1,024 work, which ``select()``
    itself refuses.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._awake, self._alarm = socket.socketpair()
        self._awake.setblocking(False)
        self._alarm.setblocking(False)
        self._selector.register(self._awake, selectors.EVENT_READ)

    def wait(self, descriptor: int | None, timeout: float | None) -> bool:
        """Wait until ``descriptor`` can be read (True), or for a wake-up or the time (False)."""
        if descriptor is not None:
            self._selector.register(descriptor, selectors.EVENT_READ)
        try:
            ready = self._selector.select(timeout)
        finally:
            if descriptor is not None:
                self._selector.unregister(descriptor)
        readable = False
        for key, _ in ready:
            if key.fileobj is self._awake:
                self._drain()
            else:
                readable = True
        return readable

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
        self._selector.close()
        self._awake.close()
        self._alarm.close()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._awake.recv(4096):
                pass
