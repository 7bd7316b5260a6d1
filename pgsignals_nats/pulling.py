"""Requests for messages of a consumer, one at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from pgsignals.plugins.within import within

AT_ONCE = 500
# A request ends after so many seconds and is made anew, so that a server which has forgotten it,
# and a consumer that is gone, are noticed.
_PULL_SECONDS = 5.0
# The seconds that the end of a request may take.
_DRAIN_SECONDS = 2.0


@dataclass(eq=False)
class Pull:
    """Asks for messages over one connection and passes them to ``take``.

    It calls ``over`` when a request ends, and ``gone``, with the reason, when there is no consumer.
    """

    client: Client
    take: Callable[[Msg], None]
    over: Callable[[], None]
    gone: Callable[[str], Awaitable[None]]

    def __post_init__(self) -> None:
        self._inbox = self.client.new_inbox()
        self._subscription: Subscription
        # Messages that the server has been asked for and has not sent yet.
        self._asked = 0
        self._asked_at = 0.0
        # Whether messages that still come are left to others.
        self._deaf = False

    async def open(self) -> None:
        """Subscribe to the answers."""
        self._subscription = await self.client.subscribe(
            self._inbox, cb=self._receive, pending_msgs_limit=-1, pending_bytes_limit=-1
        )

    async def ask(self, stream: str, consumer: str) -> None:
        """Ask for more when the former request is over."""
        now = time.monotonic()
        if now - self._asked_at > _PULL_SECONDS + 1:
            self._asked = 0  # The request's end has got lost.
        if self._asked > 0:
            return
        self._asked, self._asked_at = AT_ONCE, now
        request = {"batch": AT_ONCE, "expires": int(_PULL_SECONDS * 1e9)}
        await self.client.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}",
            json.dumps(request).encode(),
            reply=self._inbox,
        )

    async def stop(self) -> None:
        """Take what is on its way, and have the server give the request nothing more.

        A message that it gave to a request that is gone would come a long time after later ones.
        """
        try:
            drained: Awaitable[None] = self._subscription.drain()  # type: ignore[no-untyped-call]
            await within(_DRAIN_SECONDS, drained)
        finally:
            self._deaf = True

    async def _receive(self, message: Msg) -> None:
        headers = message.headers or {}
        if (status := headers.get("Status")) is not None:
            await self._end(status, headers.get("Description", ""))
            return
        self._asked -= 1
        if self._asked <= 0:
            self.over()
        # A message that is not taken is not acknowledged: the next reader gets it.
        if not self._deaf:
            self.take(message)

    async def _end(self, status: str, description: str) -> None:
        if status == "100":
            return  # A heartbeat.
        self._asked = 0
        self.over()
        # Nothing came in time, or the request was ended.
        if status in ("404", "408") or (status == "409" and "Deleted" not in description):
            return
        await self.gone(f"{status} {description}")
