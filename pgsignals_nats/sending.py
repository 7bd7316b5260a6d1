"""Sends messages and hears what becomes of them, in the thread of the loop."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from .chain import Chain, Chunk
from .ledger import Ledger
from .messages import Item, chained
from .stream import Stream

log = logging.getLogger("pgsignals.nats")

# What is not acknowledged after so many seconds is taken for lost.
_ACK_SECONDS = 10.0
# What nats-py writes to a connection by, which is not public; without it all is as slow as its
# publish().
_WRITE = "_send_command"


class Sender:
    """Sends the messages of a broadcaster: none before the former one of its record is there.

    They are a chain. After a chain has broken, one at a time is sent until the server stores one
    that it had not; what is behind that is a chain again. What is refused is given up, with all
    that is behind it, so that it is not overtaken.
    """

    def __init__(self, ledger: Ledger, stream: Stream) -> None:
        self._ledger = ledger
        self._stream = stream
        self._client: Client | None = None
        self._inbox = ""
        self._waiting: deque[Item] = deque()
        self._chain = Chain()
        # Whether the next goes by itself; the one that does, and its token.
        self._apart = False
        self._single: tuple[str, Item] | None = None
        self._tokens = itertools.count()
        self._pumping = False
        # Tasks, which are held here since nobody waits for them.
        self._tasks: set[asyncio.Task[None]] = set()

    def use(self, client: Client, inbox: str) -> None:
        """Send by this connection, and have acknowledgements come to ``inbox``."""
        self._client, self._inbox = client, inbox

    def take(self, items: Sequence[Item], failures: int) -> None:
        """Send messages of a thread that knows of so many failures."""
        if failures != self._ledger.failures:
            # What was given up meanwhile is before them.
            self._ledger.refuse(items, "a message before it was refused")
            return
        self._waiting.extend(items)
        self._start_pump()

    def _start_pump(self) -> None:
        if not self._pumping and self._waiting:
            self._pumping = True
            self._start(self._pump())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(self) -> None:
        """Send what may be sent."""
        try:
            client = self._client
            while self._waiting and self._single is None and not self._chain.full:
                if client is None or not client.is_connected:
                    await self.lost()
                    return
                if self._apart:
                    await self._send_single(client, self._waiting.popleft())
                elif (chunk := self._chain.take(self._waiting, self._stream.limit)) is not None:
                    await self._send_chunk(client, chunk)
                else:
                    return
        except (nats.errors.Error, OSError) as error:
            self._give_up_all(str(error) or type(error).__name__)
        finally:
            self._pumping = False

    async def _send_chunk(self, client: Client, chunk: Chunk) -> None:
        *others, last = chunk.items
        behind = chunk.behind
        if others:
            await self._write(client, others, behind)
            behind = others[-1].name
        # nats-py writes the others together with it.
        await self._publish(client, last, chunk.token, behind)
        # nats-py's own task has to come to write.
        await asyncio.sleep(0)

    async def _write(self, client: Client, items: Sequence[Item], behind: str) -> None:
        """Send chained messages that nobody replies to."""
        write = getattr(client, _WRITE, None)
        if write is not None:
            await write(chained(items, behind))
            return
        for item in items:
            await client.publish(
                item.head.origin.subject, item.payload, headers=item.headers(behind)
            )
            behind = item.name

    async def _send_single(self, client: Client, item: Item) -> None:
        token = f"s{next(self._tokens):x}"
        item.sent_at = time.monotonic()
        self._single = token, item
        await self._publish(client, item, token)

    async def _publish(self, client: Client, item: Item, token: str, behind: str = "") -> None:
        await client.publish(
            item.head.origin.subject,
            item.payload,
            reply=f"{self._inbox}.{token}",
            headers=item.headers(behind),
        )

    async def acknowledged(self, message: Msg) -> None:
        """Hear what has become of a message, or of a chunk."""
        token = message.subject.rpartition(".")[2]
        missing = message.headers is not None and message.headers.get("Status") == "503"
        answer = {} if missing else json.loads(message.data)
        if self._chain.has(token):
            self._heard_of_chunk(token, answer)
            return
        if self._single is None or self._single[0] != token:
            return  # It was given up.
        item = self._single[1]
        subject = item.head.origin.subject
        if missing:
            self._stream.astray = True
            self._give_up_all(f"no stream takes the subject {subject}")
        elif "error" in answer:
            self._give_up_all(f"{subject}: {answer['error'].get('description', 'refused')}")
        elif answer.get("duplicate"):
            item.sent_at = time.monotonic()
            self._start(self._look_for(token, item, answer["seq"]))
        else:
            self._stream.saw(item, answer["seq"])
            self._single, self._apart = None, False
            self._arrived([item])

    def _heard_of_chunk(self, token: str, answer: Mapping[str, Any]) -> None:
        items: list[Item] = []
        if "seq" in answer and "error" not in answer and not answer.get("duplicate"):
            items = self._chain.stored(token, answer["seq"])
        if items:
            self._stream.saw(items[-1], answer["seq"])
            self._arrived(items)
            return
        # What is under way comes before what is sent now, by the same connection.
        items = self._chain.broke()
        log.debug("%d messages are sent once more, since the chain broke: %s", len(items), answer)
        self._waiting.extendleft(reversed(items))
        self._apart = True
        self._start_pump()

    async def _look_for(self, token: str, item: Item, sequence: int) -> None:
        """Send a message once more if the one that it is a duplicate of is not there.

        The server remembers ids for longer than messages: after a purge it acknowledges messages
        that it does not store.
        """
        try:
            there, why = await self._stream.has(item, sequence), ""
        except (nats.errors.Error, asyncio.TimeoutError, OSError) as error:
            why = f"{item.head.origin.subject}: a duplicate is looked for: {error!r}"
        if self._single is None or self._single[0] != token:
            return  # The message was given up meanwhile.
        if why:
            self._give_up_all(why)
            return
        self._single = None
        if there:
            self._arrived([item])
        else:
            item.send_again(sequence)
            self._waiting.appendleft(item)
            self._start_pump()

    def _arrived(self, items: Sequence[Item]) -> None:
        notice = self._stream.notice
        if notice is not None and any(item.uid == notice.uid for item in items):
            self._stream.notice = None
        self._ledger.arrive(items)
        self._start_pump()

    def _give_up_all(self, why: str) -> None:
        """Give up all that is not acknowledged: it is published again, in its order."""
        single = [] if self._single is None else [self._single[1]]
        items = [*single, *self._chain.give_up(), *self._waiting]
        self._single = None
        self._waiting.clear()
        if items:
            self._ledger.refuse(items, why)

    async def lost(self) -> None:
        """Give up all, since the connection is lost."""
        self._give_up_all("the connection is lost")

    async def expire(self) -> None:
        """Give up all if something should have been acknowledged long ago."""
        due = time.monotonic() - _ACK_SECONDS
        if self._single is not None:
            sent_at = self._single[1].sent_at
        elif self._chain:
            sent_at = self._chain.sent_at
        else:
            return
        if sent_at < due:
            self._give_up_all(f"no acknowledgement in {_ACK_SECONDS:g} s")
