"""The stream that a broadcaster writes to: found or made, compared with what it was."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import RetentionPolicy, StreamConfig, StreamInfo

from pgsignals import BrokerError

from .connection import connect, stream_error
from .history import ID, History
from .messages import Item
from .options import SendingOptions

log = logging.getLogger("pgsignals.nats")


class Stream:
    """The known state of the stream.

    Its history outlasts a connection: another stream may be there at the next one. So does the Gap
    that readers have yet to be told, the ``notice``. ``limit`` is the length of the longest message
    that it takes.
    """

    def __init__(self, options: SendingOptions) -> None:
        self._options = options
        self.history = History()
        self.notice: Item | None = None
        self.forget()

    def forget(self) -> None:
        """Begin with another connection."""
        self.limit = 0
        # Whether the stream has to be looked for again.
        self.astray = False
        # Whether the stream removes messages because they were read.
        self._consumes = False
        # By record, the number of a message that was sent once more since the last flush that
        # succeeded: one with a lower number would be in front of it.
        self._again: dict[object, int] = {}

    async def find(self, jetstream: JetStreamContext, max_payload: int) -> str:
        """Find the stream, or make it; return why it is not the one that was written to, if so.

        Raises BrokerError.
        """
        self._jetstream = jetstream
        try:
            info = await self._find_or_create()
            other = await self.history.other_now(jetstream, info)
        except (nats.errors.Error, asyncio.TimeoutError) as error:
            raise stream_error(self._options, error) from error
        if other:
            self.history = History()
        self.history.follow(info)
        self._consumes = info.config.retention not in (None, RetentionPolicy.LIMITS)
        most = info.config.max_msg_size
        self.limit = min(max_payload, most) if most is not None and most > 0 else max_payload
        self.astray = False
        return other

    async def _find_or_create(self) -> StreamInfo:
        options = self._options
        try:
            return await self._jetstream.stream_info(options.stream_name)
        except nats.js.errors.NotFoundError:
            if not options.create:
                raise
        info = await self._jetstream.add_stream(
            StreamConfig(
                name=options.stream_name,
                subjects=[f"{options.prefix}.>"],
                num_replicas=options.replicas,
                max_age=options.max_age,
                duplicate_window=options.window,
                allow_direct=True,
            )
        )
        log.info("created the stream %s", options.stream_name)
        return info

    def saw(self, item: Item, sequence: int) -> None:
        """Note that a message was stored."""
        self.history.saw(sequence, {ID: item.name})
        if item.again and item.record is not None:
            self._again[item.record] = sequence

    def flushed(self) -> None:
        """Note that nothing is under way: whatever comes is behind all that was sent."""
        self._again.clear()

    async def has(self, item: Item, sequence: int) -> bool:
        """Whether the message that another is a duplicate of is there, and in its place."""
        if self._consumes:
            return True
        if sequence < self._again.get(item.record, 0):
            return False
        try:
            found = await self._jetstream.get_msg(self._options.stream_name, sequence)
        except nats.js.errors.NotFoundError:
            return False
        there, wanted = found.headers or {}, item.headers()
        # A database that was restored gives the uids of lost events to other ones.
        return all(there.get(name) == wanted[name] for name in (ID, "ce-time"))


async def check(options: SendingOptions, tables: Sequence[tuple[str, str]]) -> None:
    """Check, by a connection of its own, that the stream takes events of these tables.

    Raises BrokerError.
    """
    name = options.stream_name
    client = await connect(options, _ignore)
    try:
        info = await client.jetstream(timeout=5).stream_info(name)
    except (nats.errors.Error, asyncio.TimeoutError) as error:
        if not (options.create and isinstance(error, nats.js.errors.NotFoundError)):
            raise stream_error(options, error) from error
        return
    finally:
        await client.close()
    patterns = info.config.subjects or []
    for schema, table in tables:
        subject = options.subject_of(schema, table, "inserted")
        if not any(_covers(pattern, subject) for pattern in patterns):
            raise BrokerError(
                f"{options}: the stream {name} takes {', '.join(patterns)}, but not {subject}. "
                f"Add {options.prefix}.> to its subjects."
            )


async def _ignore() -> None:
    """Ignore the end of a connection that was opened for a check."""


def _covers(pattern: str, subject: str) -> bool:
    """Whether a stream's subject, which may have wildcards, takes a message's."""
    wanted, tokens = subject.split("."), pattern.split(".")
    if tokens[-1] == ">" and len(wanted) >= len(tokens):
        tokens.pop()
        del wanted[len(tokens) :]
    same = (token in ("*", each) for token, each in zip(tokens, wanted, strict=False))
    return len(wanted) == len(tokens) and all(same)
