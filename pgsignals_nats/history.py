"""The identity of a stream: another may come in its place, or an older state of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime

import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import StreamInfo

ID = "Nats-Msg-Id"


class History:
    """The known state of a stream: when it was made, where it ended, and a late message of it.

    Sequence numbers mean nothing in a stream that was made anew, nor beyond the point to which one
    was put back: a new message may have the number of one that was read.
    """

    def __init__(self) -> None:
        self._created: datetime | None = None
        self._end = 0
        self._latest: tuple[int, str | None] | None = None

    @property
    def known(self) -> bool:
        """Whether there is anything to compare with."""
        return self._created is not None

    def follow(self, info: StreamInfo) -> None:
        """Note the state of the stream."""
        self._created = info.created
        self._end = max(self._end, info.state.last_seq)

    def saw(self, sequence: int, headers: Mapping[str, str]) -> None:
        """Note a message."""
        self._end = max(self._end, sequence)
        if self._latest is None or sequence >= self._latest[0]:
            self._latest = sequence, headers.get(ID)

    def other(self, info: StreamInfo) -> str:
        """Return the reason why the stream is not the known one; empty if nothing says so."""
        name = info.config.name
        if self._created is None:
            return ""
        if info.created != self._created:
            return f"the stream {name} was made anew at {info.created}"
        if info.state.last_seq < self._end:
            return f"the stream {name} ends at {info.state.last_seq}, and had {self._end}"
        return ""

    async def other_now(self, jetstream: JetStreamContext, info: StreamInfo) -> str:
        """Return the same reason, also if the latest message is no more the one of its number."""
        if (found := self.other(info)) or self._latest is None:
            return found
        sequence, known = self._latest
        try:
            headers = (await jetstream.get_msg(info.config.name or "", sequence)).headers or {}
        except (nats.errors.Error, asyncio.TimeoutError):
            return ""  # The message is gone, or not ours to look at.
        if headers.get(ID) == known:
            return ""
        return f"{info.config.name}/{sequence} is not the message that it was"
