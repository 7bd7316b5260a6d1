"""The threads of the library, which note the error that has ended them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .logging import error_info, log
from .redaction import type_name

# Seconds in which a thread begins to run, if the interpreter could start it at all.
_BEGINNING = 1.0


class Thread(threading.Thread):
    """A daemon thread. ``failure`` describes the error that has ended it, if one has."""

    def __init__(self, name: str, work: Callable[..., object], *arguments: object) -> None:
        super().__init__(name=f"pgsignals-{name}", daemon=True)
        self._work = work
        self._arguments = arguments
        self.failure = ""
        self._asked = False
        self._begun = threading.Event()

    def start(self) -> None:
        """Start it, or raise RuntimeError at the interpreter's exit, as threading.Thread does."""
        self._asked = True
        try:
            super().start()
        except RuntimeError:
            self._asked = False
            raise

    @property
    def began(self) -> bool:
        """Whether the thread was started, even if an interrupt ended ``start`` before it knew."""
        return self._asked and self._begun.wait(_BEGINNING)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread's end, if it has begun: a clean-up after a start gets no error."""
        if self.began:
            super().join(timeout)

    def run(self) -> None:
        self._begun.set()
        try:
            self._work(*self._arguments)
        # SystemExit too, which Python passes over in silence.
        except BaseException as error:
            self.failure = f"the thread {self.name} has ended by {type_name(error)}: see the log"
            log.critical("%s", self.failure, exc_info=error_info(error))
        finally:
            # As in the standard library: a thread that has ended keeps no objects alive.
            del self._work, self._arguments


class Threads:
    """Threads that come and go; ``failure`` is that of the first that an error has ended."""

    def __init__(self) -> None:
        self._started: list[Thread] = []

    def start(self, name: str, work: Callable[..., object], *arguments: object) -> None:
        """Start one more thread. Raises RuntimeError at the interpreter's exit."""
        self._started = [each for each in self._started if each.is_alive() or each.failure]
        thread = Thread(name, work, *arguments)
        thread.start()
        self._started.append(thread)

    @property
    def alive(self) -> list[Thread]:
        """The threads that have not ended."""
        return [each for each in self._started if each.is_alive()]

    @property
    def failure(self) -> str:
        """The failure of the first thread that an error has ended; empty if none has."""
        return next((each.failure for each in self._started if each.failure), "")
