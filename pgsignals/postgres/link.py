"""Connections in psycopg2's asynchronous mode, which never block for longer than they are told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_WRITE
from psycopg2.extensions import connection as Connection

from .connection import connect_error
from .dsn import libpq_dsn, libpq_options
from .waiter import Waiter


class Link:
    """A connection to a server that may go silent at any moment, for one thread.

    It is in psycopg2's asynchronous mode: otherwise a server that goes silent in the middle of an
    answer would hold the thread for ever.
    """

    def __init__(self, dsn: str, waiter: Waiter, cancelled: Callable[[], bool]) -> None:
        self.waiter = waiter
        self.cancelled = cancelled
        self._dsn = libpq_dsn(dsn)
        self._connection: Connection | None = None
        self._encrypted = False

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self.waiter.forget()
            connection.close()

    def abandon(self) -> None:
        """In the child of a fork, drop the socket without the goodbye that close() would send.

        The server would take the goodbye for the parent's, and end the parent's session.
        """
        connection, self._connection = self._connection, None
        # One that is lost has no socket any more.
        if connection is not None and not connection.closed:
            os.close(connection.fileno())

    @property
    def server_version(self) -> int:
        """The server's version as a number: 180001 for 18.1."""
        return self._live.server_version

    @property
    def _live(self) -> Connection:
        if self._connection is None:
            raise psycopg2.InterfaceError("the session is closed")
        return self._connection

    def _connect(self, timeout: float, factory: Any = None, **parameters: str) -> None:
        """Connect within ``timeout`` seconds, or raise ConnectError.

        The parameters are libpq's, in place of those of the connection string.
        """
        try:
            options = libpq_options(self._dsn, timeout) | parameters
            self._connection = psycopg2.connect(
                self._dsn, connection_factory=factory, async_=True, **options
            )
            self._finish(time.monotonic() + timeout)
            self._encrypted = self._connection.info.ssl_in_use
        except (psycopg2.Error, TimeoutError, UnicodeError) as error:
            failure = connect_error(self._dsn, error)
        else:
            return
        self.close()
        # Outside the handler, as in connect().
        raise failure

    def _finish(self, deadline: float) -> None:
        """Wait until the connection, or the statement that was sent, has come to its end.

        Raises psycopg2.Error, and TimeoutError behind the deadline or when cancelled.
        """
        connection = self._live
        while (state := connection.poll()) != POLL_OK:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timeout expired: the server does not answer")
            if self.cancelled():
                raise TimeoutError("stopped while waiting for the server")
            # Nothing else ends this wait: a stream that is watched, and has something to read
            # meanwhile, would have us turn here without a pause.
            self.waiter.wait_alone(connection.fileno(), left, write=state == POLL_WRITE)
