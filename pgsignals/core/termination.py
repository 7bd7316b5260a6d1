"""SIGTERM and SIGINT, for code that waits for the program's end."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, TypeVar

from .errors import StateError
from .process import after_fork, notice_fork
from .threads import Thread

T = TypeVar("T")

_LOOK_SECONDS = 1.0
_former: dict[int, Any] = {}


@contextmanager
def termination(call: Callable[[], object], *, once: bool = False) -> Iterator[None]:
    """Make ``call``, in the main thread, at each SIGTERM and SIGINT during the block.

    With ``once``, make it at the first of them; the next one acts as it did before the block.

    ``call`` interrupts whatever the main thread does, so that it must take no lock. A signal that
    the process ignores (nohup, a shell's background job) stays ignored. Only for the main thread.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if once:
            _restore()
        call()

    # A fork that is noticed only after this would take the handlers back.
    notice_fork()
    _guard_forks()
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not signal.SIG_IGN:
            _former[number] = handler
            signal.signal(number, handle)
    try:
        yield
    finally:
        _restore()


def take(queue: SimpleQueue[T], timeout: float | None = None) -> T:
    """Return what a signal's handler, or a thread, puts next, to the main thread. Raises Empty.

    Another thread may take a signal, such as one that comes while the process is stopped. That does
    not wake the main thread, which must look up each second for the handler to run.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _LOOK_SECONDS if deadline is None else deadline - time.monotonic()
        try:
            return queue.get(timeout=max(0.0, min(left, _LOOK_SECONDS)))
        except Empty:
            if deadline is not None and time.monotonic() >= deadline:
                raise


class SignalledStop:
    """The wait of the main thread for a stop, which a signal may ask for."""

    def __init__(self) -> None:
        self._ends: SimpleQueue[bool | None] | None = None

    def wait(self, stopped: threading.Event, stop: Callable[[], object]) -> bool:
        """Wait for a ``stop``, or make it at a signal; return whether all was handled by then.

        A second signal ends the wait at once. Raises StateError outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise StateError(
                "run() handles signals, which Python allows in the main thread only. Elsewhere "
                "call wait(), and stop() when the program ends."
            )
        # A signal handler that interrupts take() may put; setting an Event could block for ever.
        ends: SimpleQueue[bool | None] = SimpleQueue()
        self._ends = ends
        try:
            with termination(lambda: ends.put(None)):
                if stopped.is_set():
                    return True
                drained = take(ends)
                if drained is None:
                    Thread("stop", stop).start()
                    drained = take(ends)
                return bool(drained)
        finally:
            self._ends = None

    def tell(self, drained: bool) -> None:
        """Tell the wait that the stop, which calls this from whatever thread, has ended."""
        if (ends := self._ends) is not None:
            ends.put(drained)


def _restore() -> None:
    # A copy, since a signal that comes meanwhile may restore them, too.
    for number, handler in list(_former.items()):
        # None stands for a handler that Python did not set and cannot set again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _former.clear()


@functools.cache
def _guard_forks() -> None:
    """Restore the handlers in a receiver's forks, where nobody waits: SIGTERM must end them."""
    after_fork(_restore)
