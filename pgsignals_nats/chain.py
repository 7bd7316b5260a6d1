"""Messages that are under way as a chain: the last that is stored tells of those before it."""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass

from .messages import CHAIN_LENGTH, Item

# A chunk ends with the message that makes it as long as this, or so many.
_CHUNK = 500
_CHUNK_BYTES = 512 * 1024
# The messages under way at most, and while chains break again and again. The server drops what
# comes when 10,000 wait for the stream.
_MOST = 4_000
_LEAST = 8


@dataclass(eq=False, slots=True)
class Chunk:
    """Messages of which the last is acknowledged for all of them.

    The first of them is ``behind`` the message of that name, or whatever there is.
    """

    token: str
    items: list[Item]
    behind: str
    sent_at: float


class Chain:
    """The chunks of a chain that are under way, in their order.

    The server stores a message of a chain if the last message of the stream is the one before it
    in the chain; only the first, a chunk by itself, is behind whatever there is. So if it has
    stored the first now, and a later one as many places behind it, it has stored those between. A
    chain breaks if a message is refused, is a duplicate, or somebody else writes to the stream.

    No two messages of a record are under way: what is stored of a broken chain need not be its
    beginning. Another process, or a connection that was given up, may have sent the same events in
    another order of their records, and where a duplicate is the last of the stream the chain goes
    on. All of it belongs to one thread.
    """

    def __init__(self) -> None:
        self._tokens = itertools.count()
        self._chunks: deque[Chunk] = deque()
        self._count = 0
        # The records of what is under way.
        self._records: set[bytes] = set()
        # How many messages may be under way: few where others write to the stream again and again.
        self._most = _MOST
        # The number of the last message that is known to be stored; 0 if none is.
        self._stored = 0

    def __bool__(self) -> bool:
        """Whether anything is under way."""
        return bool(self._chunks)

    @property
    def full(self) -> bool:
        """Whether no more may be sent for now."""
        return self._count >= self._most

    @property
    def sent_at(self) -> float:
        """When the first that is under way was sent."""
        return self._chunks[0].sent_at

    def has(self, token: str) -> bool:
        """Whether the token is that of a chunk under way."""
        return any(chunk.token == token for chunk in self._chunks)

    def take(self, waiting: deque[Item], limit: int) -> Chunk | None:
        """Return the next chunk, which is under way from now on.

        None if a message has to wait for what is under way: for another of its record, or since it
        has no room for the name of the one before it within ``limit``, the server's.
        """
        items: list[Item] = []
        records = self._records
        behind = ""
        if self._chunks:
            before = behind = self._chunks[-1].items[-1].name
            room, most = _CHUNK_BYTES, min(_CHUNK, self._most - self._count)
            while waiting and len(items) < most and room > 0:
                item = waiting[0]
                record = item.record
                if record in records or item.size + CHAIN_LENGTH + len(before) > limit:
                    break
                if record is not None:
                    records.add(record)
                room -= item.size
                before = item.name
                items.append(waiting.popleft())
            if not items:
                return None
        else:
            self._stored = 0
            items.append(waiting.popleft())
            if (record := items[0].record) is not None:
                records.add(record)
        chunk = Chunk(f"c{next(self._tokens):x}", items, behind, time.monotonic())
        self._chunks.append(chunk)
        self._count += len(items)
        return chunk

    def stored(self, token: str, sequence: int) -> list[Item]:
        """Return the messages that are known to be stored, now that the last of a chunk is.

        None are if the chain has broken.
        """
        chunks = self._chunks
        number = next(n for n, chunk in enumerate(chunks, 1) if chunk.token == token)
        count = sum(len(chunk.items) for chunk in itertools.islice(chunks, number))
        if count > 1 if not self._stored else sequence != self._stored + count:
            return []
        self._stored = sequence
        self._count -= count
        self._most = min(self._most + count, _MOST)
        items = [item for _ in range(number) for item in chunks.popleft().items]
        self._records.difference_update([item.record for item in items if item.record is not None])
        return items

    def broke(self) -> list[Item]:
        """Return all that is under way, to send it again, and fewer at a time."""
        self._most = max(self._most // 4, _LEAST)
        return self.give_up()

    def give_up(self) -> list[Item]:
        """Return all that is under way, and forget it."""
        items = [item for chunk in self._chunks for item in chunk.items]
        self._chunks.clear()
        self._records.clear()
        self._count = 0
        return items
