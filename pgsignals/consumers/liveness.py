"""Notices which processes have stopped, by the monotonic clock of this process alone.

Clocks of others, the server's included, may be set back or forward meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Stillness(Generic[Key]):
    """For how long each value has not changed that a process changes as long as it is well."""

    def __init__(self) -> None:
        self._seen: dict[Key, tuple[object, float]] = {}

    def note(self, found: Mapping[Key, object]) -> dict[Key, float]:
        """Note the values just found; return for how many seconds each has not changed.

        Keys that are not found any more are forgotten.
        """
        # The time after the query: a value may have changed while the query ran.
        now = time.monotonic()
        self._seen = {
            key: seen if (seen := self._seen.get(key)) and seen[0] == value else (value, now)
            for key, value in found.items()
        }
        return {key: now - since for key, (_, since) in self._seen.items()}
