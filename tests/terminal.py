"""Commands in a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import DEADLINE

ESCAPE = "\x1b["


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *arguments: str, dsn: str, **environment: str) -> None:
        self._master, slave = pty.openpty()
        self.text = ""
        cleared = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pgsignals", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**cleared, "PGSIGNALS_DSN": dsn, "TERM": "xterm-256color", **environment},
            start_new_session=True,
            # The terminal that Ctrl-C is pressed in has to be that of the session.
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        os.close(slave)

    def wait_for(self, pattern: str) -> str:
        """All that was shown until there is a match."""
        deadline = time.monotonic() + DEADLINE
        while not re.search(pattern, self.text):
            assert self._read(deadline), f"{pattern!r} is not in {self.text!r}"
        return self.text

    def end(self) -> int:
        """Its exit code, once it has ended and all of it is read."""
        while self._read(time.monotonic() + DEADLINE):
            pass
        return self.process.wait(DEADLINE)

    def press(self, keys: bytes) -> None:
        """Type something."""
        os.write(self._master, keys)

    def close(self) -> None:
        """End it, however it stands."""
        self.process.kill()
        self.process.wait(DEADLINE)
        os.close(self._master)

    def _read(self, deadline: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            piece = os.read(self._master, 65_536)
        except OSError:  # What Linux says when nobody has the terminal open any more.
            return False
        self.text += piece.decode()
        return bool(piece)


@pytest.fixture
def terminal(dsn: str) -> Iterator[Callable[..., Terminal]]:
    """Starts commands in terminals."""
    started: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        started.append(Terminal(*arguments, dsn=dsn, **environment))
        return started[-1]

    yield start
    for each in started:
        each.close()
