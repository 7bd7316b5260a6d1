"""A WAL sender that sends what a test tells it to, and notes what it is told."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from queue import Queue

_HELLO = {
    "server_version": "18.0",
    "server_encoding": "UTF8",
    "client_encoding": "SQL_ASCII",
    "DateStyle": "ISO, MDY",
    "standard_conforming_strings": "on",
}


def _packed(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def _copied(body: bytes) -> bytes:
    return _packed(b"d", body)


class WalSender:
    """Serves one connection. A context manager, whose end closes the connection.

    ``told`` has the position of each feedback that has come, as flushed. With ``tls`` everything is
    encrypted, and it sends ``first`` alone, each of them as a record.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, first: Sequence[bytes] = ()) -> None:
        self._tls, self._first = tls, first
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.told: Queue[int] = Queue()
        self.started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._socket: socket.socket

    @property
    def dsn(self) -> str:
        host, port = self._listener.getsockname()
        return f"postgresql://postgres@{host}:{port}/any?gssencmode=disable&sslmode=" + (
            "disable" if self._tls is None else "require"
        )

    def __enter__(self) -> WalSender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._listener.close()
        self._thread.join()
        self._socket.close()

    @staticmethod
    def message(lsn: int, payload: bytes) -> bytes:
        """A message of the log; one with a position has the same as the end."""
        return _copied(b"w" + struct.pack("!qqq", lsn, lsn, 0) + payload)

    @classmethod
    def begin(cls, lsn: int, commit: int) -> bytes:
        """The Begin of a transaction that began at ``lsn``."""
        return cls.message(lsn, b"B" + struct.pack("!qqi", commit, 0, 1))

    @staticmethod
    def keepalive(lsn: int, asking: bool = False) -> bytes:
        """A keepalive, which asks for an answer or not."""
        return _copied(b"k" + struct.pack("!qqb", lsn, 0, asking))

    def send(self, *messages: bytes) -> None:
        """Send messages at once, so that they are read together."""
        self.started.wait()
        self._socket.sendall(b"".join(messages))

    def end(self) -> None:
        """End the connection without a word."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        self._socket, _ = self._listener.accept()
        if self._tls is not None:
            self._socket.recv(8)
            self._socket.sendall(b"S")
            self._socket = self._tls.wrap_socket(self._socket, server_side=True)
        # A connection that is lost raises OSError, or gives nothing.
        with suppress(OSError), self._socket.makefile("rb") as file:
            (length,) = struct.unpack("!i", file.read(4))
            file.read(length - 4)
            hello = [_packed(b"S", f"{name}\0{value}\0".encode()) for name, value in _HELLO.items()]
            self._socket.sendall(
                _packed(b"R", struct.pack("!i", 0))
                + b"".join(hello)
                + _packed(b"K", struct.pack("!ii", 1, 1))
                + _packed(b"Z", b"I")
            )
            while head := file.read(5):
                kind, length = struct.unpack("!ci", head)
                body = file.read(length - 4)
                if kind == b"Q" and body.startswith(b"START_REPLICATION"):
                    self._socket.sendall(_packed(b"W", struct.pack("!bh", 0, 0)))
                    for record in self._first:
                        self._socket.sendall(record)
                    self.started.set()
                elif kind == b"Q":
                    self._socket.sendall(_packed(b"C", b"SET\0") + _packed(b"Z", b"I"))
                elif kind == b"d" and body[:1] == b"r":
                    _, _, flushed = struct.unpack("!cqq", body[:17])
                    self.told.put(flushed)
