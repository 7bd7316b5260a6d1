"""The options of a browser's stream and their checks, the same in every web framework."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigurationError
from ..core.logging import log
from .event_stream import View, encode, last_event_id
from .ring import RingClient, RingFeed

# The milliseconds after which browsers that got no stream try again.
LATER = 15_000
_PARAMETER = "last-event-id"


@dataclass(frozen=True)
class StreamOptions:
    """The options of ``sse``. Raises ConfigurationError for times that cannot be."""

    view: View
    retry: int
    keepalive: float
    lifetime: float
    send_timeout: float

    def __post_init__(self) -> None:
        if self.retry < 0 or min(self.keepalive, self.lifetime, self.send_timeout) <= 0:
            raise ConfigurationError(
                f"retry={self.retry!r}, keepalive={self.keepalive!r}, lifetime={self.lifetime!r}, "
                f"send_timeout={self.send_timeout!r}: give milliseconds from 0, and seconds above "
                "0."
            )

    def connect(
        self, feed: RingFeed[RingClient], wake: Callable[[], None], headers: Any, query: Any
    ) -> RingClient:
        """Return the client of a request, which goes on where the browser says that it was."""
        last_id = last_event_id(headers.get("Last-Event-ID"), query.get(_PARAMETER))
        return feed.connect(last_id, wake, self.view)

    def patience(self, client: RingClient, began: float) -> float:
        """Return the seconds to wait for the next event; 0 if the stream is over.

        ``began`` is the time when the stream began, by ``time.monotonic``.
        """
        left = began + self.lifetime - time.monotonic()
        return 0.0 if client.ended else max(0.0, min(self.keepalive, left))


def come_back(reason: object, milliseconds: int) -> bytes:
    """Return a stream that ends at once: after a status other than 200, an EventSource gives up."""
    log.warning("a browser was told to come back in %d ms: %s", milliseconds, reason)
    return encode(retry=milliseconds)
