"""Streams would keep a server from ending: they end when it is told to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType


class Ending:
    """Has ``call`` made, in a thread of its own, once the process gets SIGTERM."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._watching = False

    def watch(self) -> None:
        """From now on, if this is the main thread and the server handles SIGTERM itself.

        Where nobody handles it, it ends the process at once. The server's handler is called as
        before.
        """
        server = signal.getsignal(signal.SIGTERM)
        in_main = threading.current_thread() is threading.main_thread()
        if self._watching or not in_main or not callable(server):
            return
        # A handler interrupts the main thread wherever it is: it may take no lock.
        told: SimpleQueue[None] = SimpleQueue()

        def handle(number: int, frame: FrameType | None) -> None:
            told.put(None)
            server(number, frame)

        def wait() -> None:
            told.get()
            self._call()

        threading.Thread(target=wait, name="pgsignals-ending", daemon=True).start()
        signal.signal(signal.SIGTERM, handle)
        self._watching = True
