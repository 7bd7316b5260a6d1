"""Notices by the clock of this process alone who has stopped.

Clocks of others, the server's included, may be set back or forward meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Stillness(Generic[Key]):
    """Since when something has been the same that others keep changing as long as they are well."""

    def __init__(self) -> None:
        self._seen: dict[Key, tuple[object, float]] = {}

    def note(self, found: Mapping[Key, object]) -> dict[Key, float]:
        """Take note of what has just been found; of each, for how many seconds it has been so.

        What is not there any more is forgotten.
        """
        # Not before it was asked for: what is found may be from the end of that time.
        now = time.monotonic()
        self._seen = {
            key: seen if (seen := self._seen.get(key)) and seen[0] == value else (value, now)
            for key, value in found.items()
        }
        return {key: now - since for key, (_, since) in self._seen.items()}
