"""Waits for a socket or a wake-up, whichever comes first."""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

# Platforms without poll(), such as Windows, lack its flags, too.
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


def _new_poll() -> Any:
    return select.poll() if hasattr(select, "poll") else _Selector()


class Waiter:
    """Waits for a socket, or several, and can be woken by any thread.

    It uses ``poll()``, since ``select()`` refuses descriptors beyond 1,024. ``selectors`` would do,
    but would double the time that a wait costs.
    """

    def __init__(self) -> None:
        self._poll = _new_poll()
        # Apart from the other, so that nothing watched there ends a wait here.
        self._single = _new_poll()
        self._awake, self._alarm = socket.socketpair()
        self._awake.setblocking(False)
        self._alarm.setblocking(False)
        self._awake_number = self._awake.fileno()
        for each in (self._poll, self._single):
            each.register(self._awake_number, _READABLE)
        self._waited: int | None = None
        self._watched: set[int] = set()

    def wait(self, descriptor: int | None, timeout: float | None) -> bool:
        """Wait until ``descriptor`` or a watched one can be read, a wake-up comes, or time is over.

        Return whether ``descriptor`` can be read.
        """
        if descriptor != self._waited:
            self.forget()
            if descriptor is not None:
                self._poll.register(descriptor, _READABLE)
                self._waited = descriptor
        usable = False
        # A negative time would be for ever; a part of a millisecond is rounded up.
        for number, _ in self._poll.poll(None if timeout is None else max(0.0, 1000 * timeout)):
            if number == self._awake_number:
                self._drain()
            elif number == descriptor:
                usable = True
        return usable

    def wait_alone(
        self, descriptor: int | None, timeout: float | None, write: bool = False
    ) -> None:
        """Wait until ``descriptor`` can be read (or written), a wake-up comes, or time is over.

        What is watched does not end this wait. The descriptor may be closed when it has ended.
        """
        if descriptor is not None:
            self._single.register(descriptor, _WRITABLE if write else _READABLE)
        try:
            milliseconds = None if timeout is None else max(0.0, 1000 * timeout)
            for number, _ in self._single.poll(milliseconds):
                if number == self._awake_number:
                    self._drain()
        finally:
            if descriptor is not None:
                self._single.unregister(descriptor)

    def forget(self) -> None:
        """Stop watching what was given to ``wait`` last; call this before it is closed."""
        if self._waited is not None:
            self._poll.unregister(self._waited)
            self._waited = None

    def watch(self, descriptor: int) -> None:
        """Have ``wait`` end, too, when this descriptor can be read.

        It must be another one than those that are given to ``wait``.
        """
        if descriptor not in self._watched:
            self._poll.register(descriptor, _READABLE)
            self._watched.add(descriptor)

    def unwatch(self, descriptor: int) -> None:
        """Undo ``watch``; call this before the descriptor is closed."""
        if descriptor in self._watched:
            self._watched.remove(descriptor)
            self._poll.unregister(descriptor)

    def sleep(self, seconds: float, until: Callable[[], bool]) -> None:
        """Sleep for ``seconds``, or until woken with ``until()`` true."""
        deadline = time.monotonic() + seconds
        while not until() and (left := deadline - time.monotonic()) > 0:
            self.wait_alone(None, left)

    def wake(self) -> None:
        """End the wait, or the next one if none is under way."""
        # A full buffer has wake-ups enough, and after ``close`` nobody waits any more.
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
