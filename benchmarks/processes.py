"""Other processes: ours that measure themselves, and what any of them uses (Linux)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")


class Child:
    """A module of ours in a process of its own, which says and is told things line by line."""

    def __init__(self, module: str, *arguments: object) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Its input ends, and with it the process; one that hangs is not waited for.
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        if self._process.returncode and error is None:
            raise RuntimeError(f"{self._module} ended with {self._process.returncode}")

    def hear(self) -> Any:
        """The next thing that it says."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} failed: its error stands above")
        return json.loads(line)

    def tell(self, what: object = None) -> None:
        """Have it go on."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()


def say(what: object = None) -> None:
    """In the child: tell the parent."""
    print(json.dumps(what), flush=True)


def hear() -> Any:
    """In the child: the next thing that the parent says, or None at its end."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def megabytes(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(f"{field}:"))
    return int(found.split()[1]) / 1024


def _stat(pid: int) -> list[str]:
    # The program's name, in parentheses, may hold blanks.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def processor_seconds(pid: int) -> float:
    """Those of a process, of its children that have ended, and of those that have not."""
    # utime, stime, cutime, cstime.
    total = sum(int(ticks) for ticks in _stat(pid)[11:15])
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        try:
            stat = _stat(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(stat[1]) == pid:
            total += int(stat[11]) + int(stat[12])
    return total / _TICKS
