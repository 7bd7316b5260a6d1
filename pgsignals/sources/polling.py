"""Polls a log again and again, and reads a page of each partition that has something new."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import count, repeat
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
    """Takes the source's events and Gaps. None of its methods runs the user's code."""

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
        """Take an event for its receiver; return whether that receiver is there."""

    def hears(self, topic: Topic) -> bool:
        """Whether any receiver takes events of the topic."""

    def connected(self) -> None:
        """Tell the receivers that events can arrive from now on."""

    def disconnected(self, error: BaseException) -> None:
        """Tell the receivers that the connection is lost."""


class Follower(Protocol):
    """Follows, beside the sink and in the same thread, how far a partition has been read."""

    def part_begun(self, part: Partition) -> None:
        """Move the partition to where reading begins, if not at the acknowledged position."""

    def page_begun(self, part: Partition) -> None:
        """Note that a page of the partition's present window is about to be read."""

    def page_submitted(self, part: Partition) -> None:
        """Note that the page has been submitted, and that the window may have ended with it."""

    def turned(self, part: Partition) -> None:
        """Note that a turn has ended, in which there may have been no page to read."""


class Poller:
    """Polls the log, and submits pages of the claimed partitions to the sink.

    At most ``most`` events of a partition are in flight at once.
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
        """Call ``call`` once everything committed by now has been submitted."""
        self._asked.put(call)

    def begin(self) -> None:
        """Go on in a new session, and maybe in another log: its watermarks are others."""
        for _, call in self._awaited:
            self._asked.put(call)
        self._awaited.clear()

    def poll(self, source: Log) -> Poll:
        """Poll the log once."""
        # Counted before the look: a later ``settle`` may mean commits that it misses.
        if asked := self._asked.qsize():
            latest = source.latest()
            self._awaited += [(latest, self._asked.get()) for _ in range(asked)]
        poll = source.poll()
        self._claims.polled_as_of = poll.as_of
        return poll

    def read(
        self, source: Log, poll: Poll, held_up: Callable[[], bool], ending: bool = False
    ) -> tuple[bool, bool]:
        """Read a page of each partition with room; return whether any had rows, and has more.

        While reading is ``ending`` at the poll's watermark, no chunk of a backfill is begun.
        """
        found = more = stirred = filling = False
        for part in self._claims.parts.values():
            if part.outstanding >= self._most:
                # Otherwise room would be found up to 0.2 s later, with the next acknowledgement.
                part.collect()
            ready = self._has_room(part) and not (part.leaving or held_up())
            # A chunk of a backfill belongs between the messages that its snapshot sees and the
            # rest: while a chunk waits, the log is read up to its watermark alone.
            if ready and part.reader.at_end and not ending:
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
            if self._follower is not None:
                self._follower.turned(part)
        # Others may have something to read, also if this process has no room for it.
        if found or (stirred and self._sink.full):
            source.stir()
        self._call_awaited()
        return found or filling, more

    def read_windows(self) -> bool:
        """Read a page of each window that has begun; return whether any has more."""
        more = False
        for part in self._claims.parts.values():
            if not part.reader.at_end and self._has_room(part):
                self.read_page(part)
                more = more or not part.reader.at_end
        return more

    def read_page(self, part: Partition) -> bool:
        """Read a page of the partition's window, and submit it; return whether it had any rows."""
        if self._follower is not None:
            self._follower.page_begun(part)
        rows = part.reader.read()
        if rows is None:
            return False
        messages: list[Message] = []
        broken = False
        doubts = part.reader.doubts
        for found in self._decoder.decode(rows, part.claim.acknowledged_at):
            if isinstance(found, Gap):
                self._sink.gap(found)
                broken = True
            else:
                found.redelivered = doubts(found)
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
        """Submit a page to the sink; return whether any of its events are the partition's.

        ``broken``: a Gap of the page, which the sink already has, must be told before the page is
        acknowledged, so that also a page without events goes through the sink.
        """
        events: list[Event] = []
        page = LogPage(part.lease, position, 0, progress=progress)
        for message in messages:
            message.page = page
            if self._shares == 1:
                events += map(Event, repeat(message), count(), message.rows)
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
    """Return the partition of a record, which is the same in every process."""
    # The repr of a memoryview has its address, which differs between processes.
    values = tuple(bytes(each) if isinstance(each, memoryview) else each for each in key)
    return zlib.crc32(repr(values).encode()) % parts
