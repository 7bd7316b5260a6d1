"""Pauses between tries."""

from __future__ import annotations

from .rng import chance


class Backoff:
    """Pauses between tries to connect: exponential, with full jitter."""

    def __init__(self, first: float = 0.1, most: float = 30.0) -> None:
        self._first = first
        self._most = most
        self._tries = 0

    def next(self) -> float:
        """Return the seconds to wait before the next try."""
        bound = min(self._most, self._first * 2**self._tries)
        self._tries = min(self._tries + 1, 32)
        return chance.uniform(0, bound)

    def reset(self) -> None:
        """Start again from the first pause, since the connection has proved healthy."""
        self._tries = 0
