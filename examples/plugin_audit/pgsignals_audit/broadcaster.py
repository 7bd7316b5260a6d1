"""A broadcaster that appends to a file, and is sure that it is on the disk before it says so."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pgsignals import BrokerError, Event, Gap
from pgsignals.cloudevents import Writer


class AuditBroadcaster:
    """Appends each event to the file as a CloudEvent in JSON; one process writes to it at a time.

    ``source`` is the attribute of that name.
    """

    def __init__(self, path: Path, source: str | None = None) -> None:
        self._path = path
        self._writer = Writer(source or "/pgsignals/audit")
        # What has not been flushed, by uid: what is published again is not there twice.
        self._lines: dict[str, bytes] = {}

    def __str__(self) -> str:
        return f"audit://{self._path}"

    def publish(self, events: Sequence[Event]) -> None:
        """Keep the events for the next flush."""
        for event in events:
            self._keep(self._writer.attributes(event), self._writer.data(event))

    def announce(self, gap: Gap) -> None:
        """Keep a line that says what may be missing."""
        self._keep(*self._writer.gap(gap))

    def _keep(self, attributes: Mapping[str, str], data: bytes) -> None:
        line = json.dumps({**attributes, "data": json.loads(data)})
        self._lines.setdefault(attributes["id"], line.encode() + b"\n")

    def flush(self, timeout: float) -> bool:
        """Append what was published, all or nothing, and wait for the disk. Raises BrokerError."""
        try:
            with self._path.open("ab") as file:
                before = file.tell()
                try:
                    file.write(b"".join(self._lines.values()))
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    # Half a line would spoil the next one.
                    os.truncate(self._path, before)
                    raise
        except OSError as error:
            raise BrokerError(f"{self}: {error.strerror}") from error
        self._lines.clear()
        return True

    def close(self) -> None:
        """Forget what was not flushed."""
        self._lines.clear()
