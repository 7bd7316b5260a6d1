"""Sessions that never block for ever, and text in whatever encoding the database has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import errors as pg
from psycopg2 import sql
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, Notify
from psycopg2.extensions import cursor as Cursor

from .link import Link
from .session_settings import session_settings
from .waiter import Waiter

# The encoding and error handler by which bytes of any kind become text, and bytes again.
_Codec = tuple[str, str]
_UTF8 = ("utf-8", "surrogateescape")
_LATIN1 = ("latin-1", "strict")
_UNDECODED = (psycopg2.extensions.BYTES, psycopg2.extensions.BYTESARRAY)
_TEXT_TYPES = frozenset(oid for kind in _UNDECODED for oid in kind.values)
# Sent ahead of a statement whose text the server must not convert.
_UNCONVERTED = "SET LOCAL client_encoding TO SQL_ASCII; "
_CONVERSION = (pg.CharacterNotInRepertoire, pg.UntranslatableCharacter)


def _codec_of(encoding: str) -> _Codec:
    """Return the codec for text of a database in that encoding; ASCII if Python has none."""
    if encoding == "SQL_ASCII":
        return _UTF8
    return psycopg2.extensions.encodings.get(encoding, "ascii"), "surrogateescape"


def _decoded_rows(cursor: Cursor, codec: _Codec) -> list[tuple[Any, ...]]:
    # By columns, which takes half the time that asking each value whether it is text takes.
    columns: list[Any] = list(zip(*cursor.fetchall(), strict=True))
    if columns:
        for number, column in enumerate(cursor.description or ()):
            if column.type_code in _TEXT_TYPES:
                columns[number] = [_decoded(value, codec) for value in columns[number]]
    return list(zip(*columns, strict=True))


def _decoded(value: Any, codec: _Codec) -> Any:
    """Decode a text, an array of texts, or NULL; ``encode`` by the codec gives the bytes again."""
    if isinstance(value, bytes):
        return value.decode(*codec)
    return None if value is None else [_decoded(each, codec) for each in value]


def legible_rows(
    cursor: Cursor,
    statement: str,
    parameters: Sequence[Any] | Mapping[str, Any] | None = None,
) -> list[tuple[Any, ...]]:
    """Return a query's rows, outside a transaction, with texts to show, whatever their bytes."""
    encoding = cursor.connection.info.parameter_status("server_encoding") or "UTF8"
    codec, _ = _codec_of(encoding)
    with cursor.connection.cursor() as own:
        for kind in _UNDECODED:
            psycopg2.extensions.register_type(kind, own)
        own.execute(_UNCONVERTED + statement, parameters)
        return _decoded_rows(own, (codec, "replace"))


class Session(Link):
    """A connection for listening and reading that never blocks for longer than it is told.

    Each statement commits by itself.
    """

    def __init__(self, dsn: str, waiter: Waiter, cancelled: Callable[[], bool]) -> None:
        super().__init__(dsn, waiter, cancelled)
        self._codec = _UTF8
        self._converted_from: str | None = None
        self._cursor: Cursor

    def open(self, timeout: float, encoding: str = "UTF8") -> None:
        """Connect within ``timeout`` seconds, or raise ConnectError.

        ``encoding`` is the database's. A database of SQL_ASCII holds any bytes, and its server ends
        a session that asks for UTF-8 when other bytes come.
        """
        any_bytes = encoding == "SQL_ASCII"
        self._codec = _LATIN1 if any_bytes else _UTF8
        self._converted_from = None if any_bytes or encoding == "UTF8" else encoding
        self._connect(timeout, client_encoding="LATIN1" if any_bytes else "UTF8")
        # Texts are decoded here: psycopg2 would refuse a whole result for one byte of no text.
        for kind in _UNDECODED:
            psycopg2.extensions.register_type(kind, self._live)

    def keep(self, timeout: float) -> None:
        """Have the server keep the session, and its statements, for as long as we want.

        Call it once the session is known to be ours alone: behind a pooler of transactions, the
        settings would stay for others.
        """
        self.execute(session_settings(self._live.server_version), timeout=timeout)

    def execute(
        self,
        statement: str | sql.Composable,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        timeout: float,
    ) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows.

        In the rows, bytes that are no text are surrogates, which ``text`` makes legible. A text
        that the server cannot convert comes as such bytes, unless a transaction was begun before,
        which the error ends.
        Raises psycopg2.Error, and TimeoutError after ``timeout`` seconds.
        """
        self._finish_former(timeout)
        alone = self._live.info.transaction_status == TRANSACTION_STATUS_IDLE
        try:
            return self._execute(statement, parameters, timeout, self._codec)
        except _CONVERSION:
            if self._converted_from is None or not alone:
                raise
        return self.execute_unconverted(statement, parameters, timeout=timeout)

    def execute_unconverted(
        self,
        statement: str | sql.Composable,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        timeout: float,
    ) -> list[tuple[Any, ...]]:
        """Run a statement like ``execute``, and convert its text here rather than in the server.

        A conversion in the server fails as a whole for one character that Unicode does not have. In
        a transaction that was begun before, later statements are not converted either.
        """
        self._finish_former(timeout)
        codec = self._codec
        if self._converted_from is not None:
            statement = (
                _UNCONVERTED + statement
                if isinstance(statement, str)
                else sql.SQL(_UNCONVERTED) + statement
            )
            codec = _codec_of(self._converted_from)
        return self._execute(statement, parameters, timeout, codec)

    def _finish_former(self, timeout: float) -> None:
        """Wait for the answer to the former statement: a heartbeat that is answered late, say."""
        if self._live.isexecuting():
            self._finish(time.monotonic() + timeout)

    def _execute(
        self,
        statement: str | sql.Composable,
        parameters: Sequence[Any] | Mapping[str, Any] | None,
        timeout: float,
        codec: _Codec,
    ) -> list[tuple[Any, ...]]:
        self.send(statement, parameters)
        self._finish(time.monotonic() + timeout)
        return _decoded_rows(self._cursor, codec) if self._cursor.description else []

    def send(
        self,
        statement: str | sql.Composable,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a statement without waiting for its end, which ``receive`` notices."""
        # Kept, since the connection refers to the cursor weakly: otherwise poll() could fail with
        # "the asynchronous cursor has disappeared".
        self._cursor = self._live.cursor()
        self._cursor.execute(statement, parameters)

    def receive(self) -> list[Notify]:
        """Return the notifications that have arrived, without waiting.

        Over TLS, one poll may give one of several notifications, and the socket does not show the
        others any more: unless the session is ``plain``, call this until it returns none.
        """
        connection = self._live
        connection.poll()
        arrived: list[Notify] = connection.notifies
        if arrived:
            connection.notifies = []
        # In UTF-8 psycopg2 itself puts replacement characters for invalid bytes.
        if self._codec is _UTF8:
            return arrived
        return [Notify(each.pid, each.channel, self.text(each.payload)) for each in arrived]

    @property
    def codec(self) -> str:
        """Python's codec for text that comes as the database has it, not converted."""
        encoding = self._converted_from
        return "utf-8" if encoding is None else _codec_of(encoding)[0]

    def text(self, value: str) -> str:
        """Return a statement's text, with replacement characters for bytes that are not UTF-8."""
        return value if value.isascii() else value.encode(*self._codec).decode("utf-8", "replace")

    def given(self, value: str) -> str:
        """Return a text as ``execute`` would return it, to give it to a statement."""
        return value if value.isascii() else value.encode().decode(*self._codec)

    @property
    def plain(self) -> bool:
        """Whether there is no TLS, so that the socket shows everything not received yet."""
        return not self._encrypted

    def wait(self, timeout: float | None) -> bool:
        """Wait until something arrives, a wake-up or the time; return whether something arrived."""
        return self.waiter.wait(self._live.fileno(), timeout)
