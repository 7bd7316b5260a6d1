"""Reads the write-ahead log as it grows, for readers that keep resume tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Protocol

from psycopg2.extensions import cursor as Cursor

from ..consumers.acks import Partition
from ..consumers.log import DecoderHooks
from ..consumers.pages import LogPage
from ..core.errors import StateError
from ..core.events import Event, Gap, Topic
from ..core.logging import log
from ..core.lsn import lsn_text
from ..dispatch.in_flight import Page
from ..postgres.connection import connect
from ..postgres.session import Session
from ..triggers.definitions import Definition
from ..triggers.installer import Drift
from ..triggers.names import streams_slot
from ..wal.following import FollowedLog, PlacedDecoder, keep_near
from ..wal.log import WalLog
from ..wal.places import Place, PlaceCodec
from ..wal.provider import WalProvider
from ..wal.reader import WalPosition, WalReader
from .base_tail import BaseTail, Decoders, source_of
from .thread import ConnectionSettings

# For how many seconds the server keeps the log for streams, unless the settings say otherwise.
KEEP_SECONDS = 300
# The most events that a process keeps for browsers.
KEPT = 50_000
# A process that begins reads what the server has kept first.
_ATTACH_SECONDS = 60.0

Item = tuple[Place, Event | Gap]


class PlaceReader(Protocol):
    """Takes what a tail reads. The thread that reads calls it, so that no method may block."""

    def began(self, begin: Place) -> None:
        """Take everything from this place on; nothing from before it follows any more."""

    def wants(self, topic: Topic) -> bool:
        """Whether events of the topic are for this reader."""

    def put(self, items: Sequence[Item], upto: Place) -> None:
        """Take events and Gaps, in order; with them everything up to a place has been given."""


class WalSettings(ConnectionSettings, Protocol):
    """The settings of a tail of the write-ahead log."""

    @property
    def allow_unbounded_wal(self) -> bool:
        """Whether the server need not bound what it keeps."""


class WalTail(BaseTail[PlaceReader], WalProvider):
    """Reads the log for any number of readers, and keeps the latest of it for those to come.

    What was committed shortly before the process began, or while its connection was lost, comes
    through a copy of the slot that all processes with streams keep a little behind the present.
    """

    def __init__(
        self,
        options: WalSettings,
        definitions: Callable[[], Sequence[Definition]],
        decoders: Decoders,
        drift: Callable[[Cursor, Sequence[Definition]], Drift | None],
    ) -> None:
        self._unbounded = options.allow_unbounded_wal
        # The streams' slot; empty if there may be none.
        self._shared = ""
        self._keep_seconds = KEEP_SECONDS
        self._log: FollowedLog
        self._placed: PlacedDecoder
        # All events and Gaps behind ``_begin``, up to ``_upto``, of the history of ``codec``.
        self._items: deque[Item] = deque()
        self._begin = self._upto = Place(0)
        self.codec: PlaceCodec | None = None
        #: How many messages writers could not write by ``_upto``.
        self.shed = 0
        # Gaps of the page that is being decoded.
        self._broken: list[Item] = []
        # Once all up to here has been read, readers may begin: they begin in the present.
        self._goal = Place(0)
        self._caught_up = False
        # Former times, and how far the log had been read then.
        self._samples: deque[tuple[float, int]] = deque()
        super().__init__(options, definitions, decoders, drift)
        self.source = source_of(options, self)

    @property
    def session_dsn(self) -> str:
        return self._options.session_dsn

    @property
    def ephemeral(self) -> bool:
        return True

    @property
    def lease(self) -> float:
        return 5.0

    def log(self, session: Session, consumer: str, holder: str, timeout: float) -> WalLog:
        found = WalProvider.log(self, session, consumer, holder, timeout)
        assert isinstance(found, FollowedLog)
        found.shared = self._shared
        self._log = found
        return found

    def log_class(self) -> type[WalLog]:
        return FollowedLog

    def decoder(self, hooks: DecoderHooks) -> PlacedDecoder:
        self._placed = PlacedDecoder(self.decoders, hooks)
        return self._placed

    def attach(self, reader: PlaceReader) -> None:
        """Give the reader all that is kept, and everything from now on.

        Raises StateError while the log cannot be read.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._caught_up or self.ended, _ATTACH_SECONDS)
            if not self._caught_up:
                raise StateError("The log cannot be read now, or has too much to read.")
            self._readers.append(reader)
            reader.began(self._begin)
            self._give(reader, self._items)

    def installed_since(self, place: Place, wants: Callable[[Topic], bool]) -> bool:
        """Whether a wanted trigger may have been made after the place, and so missed changes."""
        return self._made_since(place.lsn, wants)

    def reaches(self, place: Place) -> bool:
        """Ask whether the log has come as far as a place. Raises what ``connect`` raises."""
        with (
            closing(connect(self._options.dsn, self._options.timing.timeout)) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(
                "SELECT pg_catalog.pg_current_wal_insert_lsn() >= %s::pg_catalog.pg_lsn",
                (lsn_text(place.lsn),),
            )
            [(reached,)] = cursor.fetchall()
        return bool(reached)

    def look_after(self, cursor: Cursor) -> None:
        """Have the server let go of the log that is older than what it is to keep."""
        if not self._shared:
            return
        now = time.monotonic()
        self._samples.append((now, self._upto.lsn))
        target = 0
        while self._samples and self._samples[0][0] <= now - self._keep_seconds:
            target = self._samples.popleft()[1]
        keep_near(cursor, self._shared, target)

    # The source's sink.

    def submit_page(self, events: Sequence[Event], page: Page) -> None:
        """See DurableSink."""
        place_of = self._placed.place_of
        items: list[Item] = [(place_of(event), event) for event in events]
        broken, self._broken = self._broken, []
        # The events of one change follow one another by their topics, in every process.
        items = sorted([*broken, *items], key=lambda item: item[0])
        if broken:
            items = [*_without_repetitions(items)]
        with self._condition:
            # A reader of the log that connects again begins where the slot does.
            self._add([item for item in items if item[0] > self._upto])
        page.acknowledge()

    def gap(self, gap: Gap, page: Page | None = None) -> None:
        if page is None and self._placed.place is not None:
            # Of a change whose place is known; the page that is being decoded brings it.
            self._broken.append((self._placed.place, gap))
            return
        if isinstance(page, LogPage) and page.announced is not None:
            # Before the Gap: who has heard of it has a token that says so.
            self.shed = page.announced.shed
        super().gap(gap, page)

    def disconnected(self, error: BaseException) -> None:
        """See DurableSink."""
        with self._condition:
            self._caught_up = False

    # The source's preparer.

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """See DurablePreparer: the Hub's own delivery has installed the triggers."""
        cursor.execute(
            "SELECT token_key::text, coalesce(keep_seconds, %s),"
            " pg_catalog.current_setting('max_slot_wal_keep_size'),"
            " pg_catalog.current_database() FROM pgsignals.settings",
            (KEEP_SECONDS,),
        )
        [(self._key, self._keep_seconds, bound, database)] = cursor.fetchall()
        if bound != "-1" or self._unbounded:
            self._shared = streams_slot(database)
        else:
            log.warning(
                "browsers that come back after a deploy or a lost connection get a gap: for them "
                "the server would keep its log without a bound, since max_slot_wal_keep_size is -1"
            )

    # The source's follower.

    def part_begun(self, part: Partition) -> None:
        """See Follower."""
        begin = Place(self._log.begin)
        present = self._log.present()
        epoch = part.announcing.epoch
        with self._condition:
            self._lease = part.lease
            self.shed = part.announcing.shed
            self._goal, self._caught_up = Place(present), False
            self._broken, self._placed.place = [], None
            former = self.codec
            if former is None or former.epoch != epoch or not begin <= self._upto <= Place(present):
                if former is not None:
                    # What readers have had does not come again, whatever the log is now.
                    begin = min(max(begin, self._upto), Place(present))
                self.codec = PlaceCodec(self._key, epoch)
                self._items.clear()
                self._begin = self._upto = begin
                if former is not None and not self._gaps:
                    now = self.source.now()
                    self._gaps.append(Gap(now, now, "retention", "the log is not kept so long"))
                for reader in self._readers:
                    reader.began(begin)
            self._tell_gaps()

    def page_begun(self, part: Partition) -> None:
        """See Follower."""

    def page_submitted(self, part: Partition) -> None:
        """See Follower."""
        position = part.pages[-1].position if part.pages else part.acknowledged
        assert isinstance(position, WalPosition)
        self._move_on(Place(position.lsn))

    def turned(self, part: Partition) -> None:
        assert isinstance(part.reader, WalReader)
        self.shed = part.announcing.shed
        if (between := part.reader.between) is not None:
            self._move_on(Place(between))

    def _move_on(self, upto: Place) -> None:
        """Note that everything before a place has been given."""
        if upto <= self._upto and (self._caught_up or self._upto < self._goal):
            return
        with self._condition:
            if upto > self._upto:
                self._upto = upto
                for reader in self._readers:
                    reader.put((), upto)
            if not self._caught_up and self._upto >= self._goal:
                self._caught_up = True
                self._condition.notify_all()

    def _add(self, items: Sequence[Item]) -> None:
        if not items:
            return
        self._upto = items[-1][0]
        for item in items:
            self._items.append(item)
        while len(self._items) > KEPT:
            self._begin = self._items.popleft()[0]
        for reader in self._readers:
            self._give(reader, items)

    def _give(self, reader: PlaceReader, items: Sequence[Item]) -> None:
        wanted = [
            item
            for item in items
            if isinstance(item[1], Gap) or reader.wants(item[1]._message.topic)
        ]
        reader.put(wanted, self._upto)

    def _tell_gaps(self) -> None:
        gaps, self._gaps = self._gaps, []
        self._add([(self._upto, gap) for gap in gaps])


def _without_repetitions(items: Sequence[Item]) -> Iterator[Item]:
    """Leave out a Gap that says the same as the one right before it."""
    detail: str | None = None
    for item in items:
        if not isinstance(item[1], Gap):
            detail = None
        elif item[1].detail == detail:
            continue
        else:
            detail = item[1].detail
        yield item
