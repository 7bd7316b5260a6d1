"""Where events go: the protocol of broadcasters, and the one that is always there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..events import Event


class Broadcaster(Protocol):
    """Takes events somewhere. Each call comes from one thread at a time for any one record."""

    def publish(self, events: Sequence[Event]) -> None:
        """Take events of one topic, in order. Raises what went wrong; others go on."""

    def flush(self, timeout: float) -> bool:
        """Wait until all that was published has arrived; whether it has, within the seconds."""

    def close(self) -> None:
        """Give up all resources."""
