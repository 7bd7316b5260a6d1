"""The server's clock, as a source knows it between the times that the server says so."""

from __future__ import annotations

import time
from datetime import datetime, timezone

from ..core.events import microseconds, moment


class ServerClock:
    """Goes on by itself from where the server has told it, late by a network's delay at most.

    This machine's clock may be set meanwhile, and after the next word of the server its own, too.
    """

    def __init__(self) -> None:
        self._offset = 0
        self.set(microseconds(datetime.now(timezone.utc)))

    def set(self, at_us: int) -> int:
        """It is so many microseconds since 1970; how many it was set back, if it was."""
        offset = at_us - time.monotonic_ns() // 1000
        back, self._offset = self._offset - offset, offset
        return max(0, back)

    def now_us(self) -> int:
        """The microseconds since 1970."""
        return self._offset + time.monotonic_ns() // 1000

    def now(self) -> datetime:
        """The same, for people."""
        return moment(self.now_us())
