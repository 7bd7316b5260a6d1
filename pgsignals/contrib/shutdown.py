"""The end of streams at the end of their server, which would otherwise wait for them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType
from typing import Any


def before_handlers(call: Callable[[], object], *numbers: int) -> bool:
    """Chain ``call`` ahead of the server's handlers of these signals; return whether any is.

    A signal without a handler ends the process at once, and is left alone. Only the main thread can
    handle signals. ``call`` interrupts that thread wherever it is: it must take no lock.
    """
    handled = False
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if callable(server := signal.getsignal(number)):
                signal.signal(number, _chained(call, server))
                handled = True
    return handled


def _chained(call: Callable[[], object], server: Callable[..., Any]) -> Callable[..., None]:
    def handle(number: int, frame: FrameType | None) -> None:
        call()
        server(number, frame)

    return handle


class Shutdown:
    """Makes ``call``, in a thread of its own, once the process gets SIGTERM."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._told: SimpleQueue[None] = SimpleQueue()
        self._watching = False

    def watch(self) -> None:
        """Watch from now on, if this is the main thread and the server handles SIGTERM itself."""
        if not self._watching and before_handlers(lambda: self._told.put(None), signal.SIGTERM):
            self._watching = True
            threading.Thread(target=self._wait, name="pgsignals-shutdown", daemon=True).start()

    def _wait(self) -> None:
        self._told.get()
        self._call()
