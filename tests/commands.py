"""Runs ``pgsignals``, and other programs, in a process of its own, as a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

import pytest

from tests.conftest import DEADLINE


@dataclass(frozen=True)
class Result:
    """How a command ended, with the lines that had not been read before."""

    code: int
    out: list[str]
    err: list[str]


class _Lines:
    """The lines of a pipe, each waited for no longer than the deadline."""

    def __init__(self, pipe: IO[str]) -> None:
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def next(self) -> str | None:
        try:
            return self._lines.get(timeout=DEADLINE)
        except Empty:
            pytest.fail("the command printed nothing more")

    def next_or_end(self) -> str | None:
        """The next line, however long it takes, or None when there is none any more."""
        return self._lines.get()

    def rest(self) -> list[str]:
        found = []
        while (line := self.next()) is not None:
            found.append(line)
        return found


class Program:
    """A running Python, with the database in its environment."""

    def __init__(
        self,
        *arguments: str,
        dsn: str = "",
        cwd: Path | None = None,
        descriptors: Collection[int] = (),
        **variables: str,
    ) -> None:
        environment = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("PG") or k == "PGSIGNALS_POSTGRES_BIN"
        }
        environment |= {"PGSIGNALS_DSN": dsn, "TZ": "UTC", "PYTHONUTF8": "1", **variables}
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment,
            cwd=cwd,
            pass_fds=descriptors,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._out = _Lines(self.process.stdout)
        self._err = _Lines(self.process.stderr)

    def out(self) -> str:
        """The next line on stdout."""
        line = self._out.next()
        if line is None:
            pytest.fail(f"stdout ended; stderr: {self._err.rest()}")
        return line

    def err(self) -> str:
        """The next line on stderr."""
        line = self._err.next()
        if line is None:
            pytest.fail(f"stderr ended; stdout: {self._out.rest()}")
        return line

    def interrupt(self) -> Result:
        """Press Ctrl-C and wait for the end."""
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def end(self) -> Result:
        """Wait for the end."""
        out, err = self._out.rest(), self._err.rest()
        return Result(self.process.wait(DEADLINE), out, err)


class Command(Program):
    """A running ``pgsignals``, with the database in its environment."""

    def __init__(self, *arguments: str, dsn: str = "", cwd: Path | None = None) -> None:
        super().__init__("-m", "pgsignals", *arguments, dsn=dsn, cwd=cwd)


def run(*arguments: str, dsn: str = "", cwd: Path | None = None) -> Result:
    """Run a command to its end."""
    return Command(*arguments, dsn=dsn, cwd=cwd).end()


def examined(
    *arguments: str, dsn: str, cwd: Path | None = None
) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and what --json says, by check."""
    result = run("doctor", "--json", *arguments, dsn=dsn, cwd=cwd)
    report = json.loads(result.out[0])
    assert report["ok"] == (result.code == 0)
    return result.code, {each["check"]: each for each in report["checks"]}
