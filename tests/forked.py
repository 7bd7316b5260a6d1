"""Runs programs as ``tests.commands`` does, in processes that need not import all anew.

Each is a process of its own, but a fork of one that has imported the library and what that needs,
so that it starts in a fraction of the time. Where the start of an interpreter is what is proved,
or what is imported, ``tests.commands`` is for that.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tests import fork_server
from tests.commands import Program, Result, _Lines

LIBRARY = ("psycopg2.extras", "psycopg2.errorcodes", "pgsignals.cli")


class ForkServer:
    """A process that has imported some modules, and forks others."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        # A message is taken as a whole, and the end is noticed.
        self._asking, asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with asked:
            self._process = subprocess.Popen(
                [sys.executable, fork_server.__file__, str(asked.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUTF8": "1"},
                pass_fds=[asked.fileno()],
            )

    def start(
        self, arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str]
    ) -> Process:
        """Fork a process that runs a program with these arguments."""
        asked = {
            "arguments": arguments,
            "folder": str(folder),
            "environment": dict(environment),
        }
        pipes = [os.pipe() for _ in range(3)]
        given = [writer for _, writer in pipes]
        try:
            socket.send_fds(self._asking, [json.dumps(asked).encode()], given)
        finally:
            for writer in given:
                os.close(writer)
        return Process(arguments, *(reader for reader, _ in pipes))


class Process:
    """What a test needs of ``subprocess.Popen``, of a process that is not our own child."""

    def __init__(self, arguments: tuple[str, ...], out: int, err: int, told: int) -> None:
        self.args = arguments
        self.stdout = os.fdopen(out, encoding="utf-8")
        self.stderr = os.fdopen(err, encoding="utf-8")
        # The end of the process that waits for it ends this, too.
        self._told = os.fdopen(told, "rb", buffering=0)
        self.pid = int(self._line())
        self.returncode: int | None = None

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            piece = self._told.read(1)
            assert piece, "the process that forks has ended"
            line += piece
        return line

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        code = self._ended(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], timeout)[0]:
            self.returncode = int(self._line())
            self._told.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server(modules: tuple[str, ...]) -> ForkServer:
    """The one for these modules; it ends with this process."""
    return ForkServer(modules)


class Forked(Program):
    """A running Python program, with the database in its environment, and ``modules`` at hand."""

    modules = LIBRARY

    def __init__(
        self, *arguments: str, dsn: str = "", cwd: Path | None = None, **variables: str
    ) -> None:
        environment = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("PG") or k == "PGSIGNALS_POSTGRES_BIN"
        }
        environment |= {"PGSIGNALS_DSN": dsn, "TZ": "UTC", "PYTHONUTF8": "1", **variables}
        process = _server(self.modules).start(arguments, cwd or Path.cwd(), environment)
        self.process = cast("subprocess.Popen[str]", process)
        self._out = _Lines(process.stdout)
        self._err = _Lines(process.stderr)


def run(*arguments: str, dsn: str = "", cwd: Path | None = None) -> Result:
    """Run a ``pgsignals`` command to its end."""
    return Forked("-m", "pgsignals", *arguments, dsn=dsn, cwd=cwd).end()


def examined(
    *arguments: str, dsn: str, cwd: Path | None = None
) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and what ``pgsignals doctor --json`` says, by check."""
    result = run("doctor", "--json", *arguments, dsn=dsn, cwd=cwd)
    report = json.loads(result.out[0])
    assert report["ok"] == (result.code == 0)
    return result.code, {each["check"]: each for each in report["checks"]}
