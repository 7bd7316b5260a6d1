"""The end of a command at Ctrl-C, at SIGTERM, or when a thread says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from ..core.termination import take, termination


class End:
    """The main thread's wait for a reason to end; the first one given counts."""

    def __init__(self) -> None:
        # A signal handler may use this, unlike most of what can wake a thread.
        self._reasons: SimpleQueue[str] = SimpleQueue()

    def give(self, reason: str) -> None:
        """Give a reason to end, from any thread."""
        self._reasons.put(reason)

    def wait(self, timeout: float | None = None) -> str | None:
        """Return the reason, or None if there is none within ``timeout`` seconds."""
        try:
            return take(self._reasons, timeout)
        except Empty:
            return None


@contextmanager
def interruptible() -> Iterator[End]:
    """Yield an End to which SIGINT or SIGTERM gives ``interrupted``; the next one acts as ever."""
    end = End()
    with termination(lambda: end.give("interrupted"), once=True):
        yield end
