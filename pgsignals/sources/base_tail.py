"""Reads a log as it grows, for browsers that come back with resume tokens: what tails share.

A process has one tail, however many readers there are, apart from the Hub's own consumer. That one
may have a name, and then shares its events among processes; and it waits for receivers, for which
readers must not wait.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from psycopg2.extensions import cursor as Cursor

from ..consumers.acks import Partition
from ..consumers.channels import Described
from ..consumers.claims import Consumer
from ..consumers.dead_letters import DeadLetter
from ..consumers.decoding import ChannelDecoder
from ..consumers.log import Log
from ..core.events import Event, Gap, Topic
from ..core.metrics import Meter
from ..core.payload import Cast
from ..dispatch.in_flight import Lease, Page
from ..triggers import names
from ..triggers.definitions import Definition
from ..triggers.installer import Drift
from .durable import DurablePreparer, DurableSource
from .polling import DurableSink, Follower
from .thread import ConnectionSettings

Decoders = Callable[[Sequence[Described], Cast], Mapping[int, ChannelDecoder]]
R = TypeVar("R")


class Following(DurablePreparer, DurableSink, Follower, Protocol):
    """What a tail is for its source."""


def source_of(options: ConnectionSettings, tail: Following) -> DurableSource:
    """Return the source of a tail."""
    # Not counted here: events are counted where receivers get them.
    return DurableSource(options, tail, tail, Meter(), Consumer(), 1 << 30, follower=tail)


class BaseTail(ABC, Generic[R]):
    """Reads a log from now on for any number of readers: a source's preparer, sink and follower.

    The Hub's own delivery has installed the triggers, and gives its ``definitions`` and decoders.
    """

    def __init__(
        self,
        options: ConnectionSettings,
        definitions: Callable[[], Sequence[Definition]],
        decoders: Decoders,
        drift: Callable[[Cursor, Sequence[Definition]], Drift | None],
    ) -> None:
        self._options = options
        # The preparer of the Hub's delivery, whose own source installs triggers that are missing.
        self.drift = drift
        self.missing = ""
        self.coming: Sequence[Definition] = ()
        self._defined = definitions
        self._decoders_of = decoders
        self._readers: list[R] = []
        self._condition = threading.Condition()
        self._decoders: Mapping[int, ChannelDecoder] = {}
        self._definitions: Sequence[Definition] = ()
        self._made: dict[int, int] = {}
        self.ended = False
        # The lease that is read in, and Gaps of the next one, whose reading has yet to begin.
        self._lease: Lease | None = None
        self._gaps: list[Gap] = []
        self._key = ""
        self.source: DurableSource

    def start(self) -> None:
        """Connect, and begin to read. Raises the error if that fails."""
        self.source.start()

    def stop(self, timeout: float) -> None:
        """End, waiting at most ``timeout`` seconds. Safe to call twice."""
        self.ended = True
        with self._condition:
            self._condition.notify_all()
        self.source.stop(timeout)

    def abandon(self) -> None:
        """In the child of a fork, give up all that is inherited."""
        self._condition = threading.Condition()
        self._readers = []
        self.source.abandon()

    def detach(self, reader: R) -> None:
        """Give the reader nothing any more."""
        with self._condition:
            if reader in self._readers:
                self._readers.remove(reader)

    def hurry(self) -> None:
        """Poll the log at once."""
        self.source.wake()

    def look_after(self, cursor: Cursor) -> None:
        """Do, every few seconds in another thread, what the log needs for readers."""

    def _made_since(self, number: int, wants: Callable[[Topic], bool]) -> bool:
        """Whether a wanted trigger may have been made after an id, and so missed changes."""
        return any(
            self._made.get(names.channel_key(each.trigger.hash), 0) > number
            for each in self._definitions
            if wants(each.topic)
        )

    # The source's sink.

    @property
    def full(self) -> bool:
        """See DurableSink: readers keep what they can."""
        return False

    @abstractmethod
    def submit_page(self, events: Sequence[Event], page: Page) -> None:
        """See DurableSink."""

    def gap(self, gap: Gap, page: Page | None = None) -> None:
        """See DurableSink."""
        with self._condition:
            self._gaps.append(gap)
            # Readers must be told the point where reading begins anew before the Gap that is why.
            if page is None or page.lease is self._lease:
                self._tell_gaps()
        if page is not None:
            page.acknowledge()

    @abstractmethod
    def _tell_gaps(self) -> None:
        """Tell readers of the Gaps."""

    def redeliver(self, event: Event, letter: DeadLetter) -> bool:
        """See DurableSink: there are no dead letters."""
        return False

    def hears(self, topic: Topic) -> bool:
        """See DurableSink."""
        return True

    def connected(self) -> None:
        """See DurableSink."""

    @abstractmethod
    def disconnected(self, error: BaseException) -> None:
        """See DurableSink."""

    # The source's preparer.

    def define(self, cursor: Cursor) -> Sequence[Definition]:
        """See DurablePreparer."""
        self._definitions = self._defined()
        return self._definitions

    @abstractmethod
    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """See DurablePreparer: the Hub's own delivery has installed the triggers."""

    def repair(self, cursor: Cursor, listened: Sequence[Definition]) -> str:
        """See DurablePreparer."""
        drift = self.drift(cursor, listened)
        return "" if drift is None else drift.reason

    def handover(self, former: Log, holder: str, timeout: float) -> None:
        """See DurablePreparer: without a name, it has no other log to come from."""

    def decoders(self, channels: Sequence[Described], cast: Cast) -> Mapping[int, ChannelDecoder]:
        """See DurablePreparer."""
        self._made = {each.channel: each.made for each in channels}
        self._decoders = self._decoders_of(channels, cast)
        return self._decoders

    # The source's follower.

    @abstractmethod
    def part_begun(self, part: Partition) -> None:
        """See Follower."""

    @abstractmethod
    def page_begun(self, part: Partition) -> None:
        """See Follower."""

    @abstractmethod
    def page_submitted(self, part: Partition) -> None:
        """See Follower."""

    def turned(self, part: Partition) -> None:
        """See Follower."""
