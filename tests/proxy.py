"""A TCP proxy that can be made to fail the way networks do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

_CHUNK = 65_536


class Proxy:
    """Stands between a client and a server on this machine, and cuts, stalls or slows them.

    ``host`` and ``port`` are the server's; clients connect to ``127.0.0.1`` and :attr:`port`. A
    context manager, which ends every connection through it.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server = host, port
        self._lock = threading.Condition()
        self._pairs: set[_Pair] = set()
        self._stalled = False
        self._delay = 0.0
        self._rate: float | None = None
        self._listener: socket.socket | None = None
        self.port = 0

    def __enter__(self) -> Proxy:
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self.cut()

    def accept(self) -> None:
        """Take connections, on the same port as before."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def refuse(self) -> None:
        """Refuse new connections until ``accept``; those that are open go on."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # Closing alone does not wake a thread that is inside accept().
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def cut(self) -> int:
        """Reset every open connection, as a firewall or a crash does; how many there were."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
            self._lock.notify_all()
        for pair in pairs:
            pair.reset()
        return len(pairs)

    def stall(self) -> None:
        """Swallow nothing and forward nothing: a black hole, for new connections too."""
        with self._lock:
            self._stalled = True

    def resume(self) -> None:
        """End ``stall``: what was held back goes on."""
        with self._lock:
            self._stalled = False
            self._lock.notify_all()

    def slow(self, delay: float = 0.0, rate: float | None = None) -> None:
        """Forward each piece ``delay`` seconds late, and at most ``rate`` bytes a second."""
        with self._lock:
            self._delay, self._rate = delay, rate

    @property
    def connections(self) -> int:
        """How many connections are open."""
        with self._lock:
            return len(self._pairs)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._server)
            except OSError:
                client.close()
                continue
            pair = _Pair(client, server)
            with self._lock:
                self._pairs.add(pair)
            for source, target in ((client, server), (server, client)):
                threading.Thread(
                    target=self._pump, args=(pair, source, target), daemon=True
                ).start()

    def _pump(self, pair: _Pair, source: socket.socket, target: socket.socket) -> None:
        # A socket that the other pump, or cut(), has closed raises OSError.
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                with self._lock:
                    self._lock.wait_for(lambda: not self._stalled or pair not in self._pairs)
                    delay, rate = self._delay, self._rate
                if delay or rate:
                    time.sleep(delay + (len(data) / rate if rate else 0.0))
                target.sendall(data)
        with self._lock:
            self._pairs.discard(pair)
        pair.close()


class _Pair:
    """The two sockets of one connection."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._sockets = client, server

    def reset(self) -> None:
        for end in self._sockets:
            with contextlib.suppress(OSError):
                # Lingering for no time makes close() send a reset in place of an orderly end.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
