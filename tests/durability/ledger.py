"""What consumers note of each delivery, in a file that outlives them.

It is a file that each process opens with O_APPEND and writes to with one write(2) for each line:
what write(2) has returned from is the kernel's, however its process ends, and the order of the
lines is the order in which the deliveries were noted, across processes. A table in a second server
would leave open, for each note under way at a kill, whether its commit had come through.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Delivery:
    """An event as a receiver got it; ``nonce`` tells apart versions that have the same ``n``."""

    consumer: str
    process: int
    sequence: int
    record: int
    n: int
    nonce: str
    uid: str
    redelivered: bool


@dataclass(frozen=True)
class Remark:
    """What else a process had to say: ``dies``, ``emptied``, ``raises``, ``ends``."""

    consumer: str
    process: int
    kind: str
    detail: str


@dataclass(frozen=True)
class Announced:
    """A Gap: what was committed from ``since`` to ``until`` may be missing."""

    consumer: str
    process: int
    since: datetime
    until: datetime
    detail: str


Note = Delivery | Remark | Announced


class Pen:
    """Writes to the ledger, for one process of a consumer."""

    def __init__(self, path: Path, consumer: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._consumer = consumer
        self._sequence = 0

    def deliver(self, record: int, n: int, nonce: str, uid: str, redelivered: bool) -> None:
        """Note a delivery."""
        self._sequence += 1
        fields = ("D", self._sequence, record, n, nonce, uid, int(redelivered))
        self._write(fields)

    def remark(self, kind: str, detail: str = "") -> None:
        """Note something else."""
        self._write(("R", kind, detail.replace("\t", " ").replace("\n", " ")))

    def announce(self, since: datetime, until: datetime, detail: str) -> None:
        """Note a Gap."""
        detail = detail.replace("\t", " ").replace("\n", " ")
        self._write(("G", since.isoformat(), until.isoformat(), detail))

    def _write(self, fields: tuple[object, ...]) -> None:
        mark, *rest = fields
        line = "\t".join(map(str, (mark, self._consumer, os.getpid(), *rest))) + "\n"
        data = line.encode()
        if os.write(self._file, data) != len(data):
            raise OSError("a note was cut short")


class Reader:
    """Reads the ledger on from where it has come to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> Iterator[Note]:
        """The notes since the last time."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        # A line is written whole, but a reader may come in between.
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].decode().splitlines():
            mark, consumer, process, *rest = line.split("\t")
            if mark == "R":
                yield Remark(consumer, int(process), *rest)
            elif mark == "G":
                since, until = map(datetime.fromisoformat, rest[:2])
                yield Announced(consumer, int(process), since, until, rest[2])
            else:
                sequence, record, n, nonce, uid, redelivered = rest
                yield Delivery(
                    consumer,
                    int(process),
                    int(sequence),
                    int(record),
                    int(n),
                    nonce,
                    uid,
                    redelivered == "1",
                )
