"""The threads of the library: one that ends by an error leaves word."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .logging import error_info, log
from .redaction import type_name

# Seconds in which a thread begins to run, if the interpreter could start it at all.
_BEGINNING = 1.0


class Thread(threading.Thread):
    """A daemon thread. ``failure`` says what has ended it, if an error did."""

    def __init__(self, name: str, work: Callable[..., object], *arguments: object) -> None:
        super().__init__(name=f"pgsignals-{name}", daemon=True)
        self._work = work
        self._arguments = arguments
        self.failure = ""
        self._asked = False
        self._begun = threading.Event()

    def start(self) -> None:
        """Raise RuntimeError at the interpreter's exit, as threading.Thread does."""
        self._asked = True
        try:
            super().start()
        except RuntimeError:
            self._asked = False
            raise

    @property
    def began(self) -> bool:
        """Whether it was started, even where an interrupt has ended ``start`` before it knew."""
        return self._asked and self._begun.wait(_BEGINNING)

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, if it has begun: whoever cleans up after a start gets no error."""
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
            # As in the standard library: a thread that has ended keeps nobody alive.
            del self._work, self._arguments


class Threads:
    """Threads that come and go; ``failure`` says what has ended the first that an error did."""

    def __init__(self) -> None:
        self._started: list[Thread] = []

    def start(self, name: str, work: Callable[..., object], *arguments: object) -> None:
        """Start one more. Raises RuntimeError at the interpreter's exit."""
        self._started = [each for each in self._started if each.is_alive() or each.failure]
        thread = Thread(name, work, *arguments)
        thread.start()
        self._started.append(thread)

    @property
    def alive(self) -> list[Thread]:
        """Those that have not ended."""
        return [each for each in self._started if each.is_alive()]

    @property
    def failure(self) -> str:
        """What has ended one of them; empty when nothing has."""
        return next((each.failure for each in self._started if each.failure), "")
