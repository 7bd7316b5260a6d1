"""Polls a log: one look after another, and a page for each part that has something new."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol

from ..consumers.acks import Partition
from ..consumers.backfills.runner import Backfilling
from ..consumers.claims import Claims, Consumer
from ..consumers.consumer_store import Progress
from ..consumers.dead_letters import DeadLetter
from ..consumers.log import Log, MessageDecoder, Poll, Position, Watermark
from ..consumers.pages import LogPage
from ..core.events import Event, Gap, Message, Topic
from ..dispatch.in_flight import Page


class DurableSink(Protocol):
    """What the source feeds. None of its methods runs code of the user's."""

    @property
    def full(self) -> bool:
        """Whether the source should read no further for now."""

    def submit_page(self, events: Sequence[Event], page: Page) -> None:
        """Take events; ``page.acknowledge`` is called when all receivers have been handed them."""

    def gap(self, gap: Gap, page: Page | None = None) -> None:
        """Tell the receivers of a Gap, before anything that is submitted later.

        ``page.acknowledge`` is called when they have been told.
        """

    def redeliver(self, event: Event, letter: DeadLetter) -> bool:
        """Take an event for one receiver; whether there is that receiver."""

    def hears(self, topic: Topic) -> bool:
        """Whether somebody takes events of the topic."""

    def connected(self) -> None:
        """Tell the receivers that events can arrive from now on."""

    def disconnected(self, error: BaseException) -> None:
        """Tell the receivers that the connection is lost."""


class Follower(Protocol):
    """Takes note, beside the sink and in the same thread, of how far a part has been read."""

    def part_begun(self, part: Partition) -> None:
        """Move the part to where reading begins, other than where it was acknowledged."""

    def page_begun(self, part: Partition) -> None:
        """Take note that the next page is of the part's window."""

    def page_submitted(self, part: Partition) -> None:
        """Take note that the page has been submitted, with which the window may have ended."""


class Poller:
    """Looks at the log, and submits pages to the sink, for the parts that are claimed.

    ``most`` events of a part are under way at once.
    """

    def __init__(
        self,
        sink: DurableSink,
        consumer: Consumer,
        most: int,
        claims: Claims,
        decoder: MessageDecoder,
        backfilling: Backfilling,
        follower: Follower | None,
    ) -> None:
        self._sink = sink
        self._shares = consumer.parts
        self._most = most
        self._claims = claims
        self._decoder = decoder
        self._backfilling = backfilling
        self._follower = follower
        self._asked: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._awaited: list[tuple[Watermark, Callable[[], None]]] = []
        self.received = 0

    def settle(self, call: Callable[[], None]) -> None:
        """Have ``call`` called once all that is committed by now has been submitted."""
        self._asked.put(call)

    def poll(self, source: Log) -> Poll:
        """Poll once."""
        # Those that ask later may mean more than this poll sees.
        asked = self._asked.qsize()
        now = time.monotonic()
        poll = source.poll()
        self._awaited += [(poll.watermark, self._asked.get()) for _ in range(asked)]
        self._claims.polled_at = now
        return poll

    def read(self, source: Log, poll: Poll, held_up: Callable[[], bool]) -> tuple[bool, bool]:
        """Read a page for each part that wants one; whether there was, and is more."""
        found = more = stirred = filling = False
        for part in self._claims.parts.values():
            if part.outstanding >= self._most:
                # There may be room, which is not for the next acknowledgement to find.
                part.collect()
            ready = self._has_room(part) and not (part.leaving or held_up())
            # A chunk of a backfill belongs between what its snapshot sees and what it does not.
            if ready and part.reader.at_end:
                self._backfilling.take(part)
            if not self._backfilling.holds(part):
                part.reader.read_to(poll.watermark)
            filling = filling or self._backfilling.under_way(part)
            if not part.reader.at_end:
                stirred = True
                if ready:
                    any_rows = self.read_page(part)
                    found = found or any_rows
                    more = more or not part.reader.at_end
            if ready and part.reader.at_end and self._backfilling.holds(part):
                message, progress = self._backfilling.give(part)
                messages = [] if message is None else [message]
                self._submit(part, messages, part.reader.position, progress)
                more = True
        if found or (stirred and self._sink.full):
            source.stir()
        self._call_awaited()
        return found or filling, more

    def read_windows(self) -> bool:
        """Read a page of each window that has begun; whether there is more of one."""
        more = False
        for part in self._claims.parts.values():
            if not part.reader.at_end and self._has_room(part):
                self.read_page(part)
                more = more or not part.reader.at_end
        return more

    def read_page(self, part: Partition) -> bool:
        """Read a page of the part's window, and submit it; whether it had any rows."""
        if self._follower is not None:
            self._follower.page_begun(part)
        rows = part.reader.read()
        if rows is None:
            return False
        messages: list[Message] = []
        broken = False
        for found in self._decoder.decode(rows, part.claim.acknowledged_at):
            if isinstance(found, Gap):
                self._sink.gap(found)
                broken = True
            else:
                found.redelivered = part.reader.doubts(found)
                messages.append(found)
        any_rows = self._submit(part, messages, part.reader.turn(rows), broken=broken) or bool(rows)
        if self._follower is not None:
            self._follower.page_submitted(part)
        return any_rows

    def _has_room(self, part: Partition) -> bool:
        return not self._sink.full and part.outstanding < self._most

    def _submit(
        self,
        part: Partition,
        messages: Sequence[Message],
        position: Position,
        progress: Progress | None = None,
        broken: bool = False,
    ) -> bool:
        """Hand a page over to the sink; whether any of its events are the part's.

        ``broken``: a Gap, which is in the sink by now, belongs before the page's end.
        """
        events: list[Event] = []
        page = LogPage(part.lease, position, 0, progress=progress)
        for message in messages:
            message.page = page
            if self._shares == 1:
                events += [Event(message, n, row) for n, row in enumerate(message.rows)]
            else:
                width = len(message.topic.key)
                events += [
                    Event(message, n, row)
                    for n, row in enumerate(message.rows)
                    if part_of(row[:width], self._shares) == part.claim.part
                ]
        page.count = len(events)
        part.add(page)
        if not events and not broken:
            page.acknowledge()
            return False
        self.received += len(events)
        self._sink.submit_page(events, page)
        return True

    def _call_awaited(self) -> None:
        due = [
            (wanted, call)
            for wanted, call in self._awaited
            if all(part.reader.covers(wanted) for part in self._claims.parts.values())
        ]
        for each in due:
            self._awaited.remove(each)
            each[1]()


def part_of(key: tuple[object, ...], parts: int) -> int:
    """Which part a record belongs to: the same in every process."""
    # What represents a memoryview is its address.
    values = tuple(bytes(each) if isinstance(each, memoryview) else each for each in key)
    return zlib.crc32(repr(values).encode()) % parts
