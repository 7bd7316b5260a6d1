"""Ending at Ctrl-C, SIGTERM, or when a thread says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from ..core.termination import take, termination


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
    with termination(lambda: end.give("interrupted"), once=True):
        yield end
