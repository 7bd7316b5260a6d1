"""The server's clock, as a source reckons it between the times that the server tells."""

from __future__ import annotations

import time
from datetime import datetime, timezone

from ..core.events import microseconds, moment


class ServerClock:
    """Goes on by the monotonic clock from the time the server told, late by the network's delay.

    Setting this machine's clock does not matter; setting the server's does with the next ``set``.
    """

    def __init__(self) -> None:
        self._offset = 0
        self.set(microseconds(datetime.now(timezone.utc)))

    def set(self, at_us: int) -> int:
        """Set the clock to so many microseconds since 1970; return by how many it was set back."""
        offset = at_us - time.monotonic_ns() // 1000
        back, self._offset = self._offset - offset, offset
        return max(0, back)

    def now_us(self) -> int:
        """Return the microseconds since 1970."""
        return self._offset + time.monotonic_ns() // 1000

    def now(self) -> datetime:
        """Return the time as a datetime."""
        return moment(self.now_us())
