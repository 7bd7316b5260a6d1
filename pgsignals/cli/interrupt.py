"""Ending at Ctrl-C, SIGTERM, or when a thread says so."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType

from ..core.termination import take


class End:
    """Where the main thread waits for a reason to end; the first one given counts."""

    def __init__(self) -> None:
        # Of all that can wake a thread, this may be used in a signal handler.
        self._reasons: SimpleQueue[str] = SimpleQueue()

    def give(self, reason: str) -> None:
        """Say why to end; from any thread."""
        self._reasons.put(reason)

    def wait(self, timeout: float | None = None) -> str | None:
        """The reason, or None when there is none within ``timeout`` seconds."""
        try:
            return take(self._reasons, timeout)
        except Empty:
            return None


@contextmanager
def interruptible() -> Iterator[End]:
    """SIGINT and SIGTERM give the reason ``interrupted``, once; the next one acts as ever."""
    end = End()
    signals = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        end.give("interrupted")

    for number in signals:
        signal.signal(number, handle)
    try:
        yield end
    finally:
        restore()
