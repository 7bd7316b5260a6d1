"""The last hour of numbers, in memory and within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .model import ConsumerState

# A point stands for so many seconds, and has the highest number in them.
POINT_SECONDS = 30
POINTS = 120


@dataclass(frozen=True)
class Lag:
    """How far a consumer is behind: in events (None if nobody knows), bytes and seconds."""

    events: int | None
    bytes: int
    seconds: float

    def worst(self, other: Lag) -> Lag:
        """Return the greater of each."""
        known = [each for each in (self.events, other.events) if each is not None]
        return Lag(
            max(known, default=None),
            max(self.bytes, other.bytes),
            max(self.seconds, other.seconds),
        )


class History:
    """The lag of each consumer over the last hour: at most POINTS points for each.

    A consumer that has gone is forgotten with its last point.
    """

    def __init__(self) -> None:
        self._points: dict[str, deque[tuple[int, Lag]]] = {}

    def note(self, seconds: float, consumers: Iterable[ConsumerState]) -> None:
        """Take in the lag at a time, in seconds since whenever."""
        number = int(seconds // POINT_SECONDS)
        for each in consumers:
            lag = Lag(each.lag, each.lag_bytes, each.lag_seconds)
            points = self._points.setdefault(each.key, deque(maxlen=POINTS))
            if points and points[-1][0] == number:
                lag = points.pop()[1].worst(lag)
            points.append((number, lag))
        for key, points in list(self._points.items()):
            while points and points[0][0] <= number - POINTS:
                points.popleft()
            if not points:
                del self._points[key]

    def lags(self, seconds: float) -> Mapping[str, list[tuple[int, Lag]]]:
        """Return each consumer's points, with how many points ago each was."""
        number = int(seconds // POINT_SECONDS)
        return {
            key: [(number - at, lag) for at, lag in points] for key, points in self._points.items()
        }
