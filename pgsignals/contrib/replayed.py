"""Server-sent events from the write-ahead log: a browser that comes back gets what it has missed.

An id is a resume token, good in every process: it names a place in the log. A process keeps the
latest events, those from before it began included, and a client goes on among them wherever it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg2

from ..core.errors import ConnectError
from ..core.events import Gap, Topic, model_identity
from ..core.logging import log
from ..core.process import notice_fork
from ..core.redaction import error_text
from ..hub.hub import Hub
from ..sources.wal_tail import KEPT, Item, WalTail
from ..wal.places import Place, PlaceCodec
from .event_stream import EVERYTHING, View
from .ring import GONE, Entry, RingClient, RingFeed, Wanted, wake_all


class _Position:
    """A place in one history of the log; ``lost`` is why what follows cannot be had, if so.

    Its token is computed when it is asked for, since most events' ids are sent to nobody.
    """

    __slots__ = ("_id", "_shed", "codec", "lost", "place")

    def __init__(self, place: Place, codec: PlaceCodec, shed: int, lost: str = "") -> None:
        self.place = place
        self.codec = codec
        self.lost = lost
        self._shed = shed
        self._id: str | None = None

    @property
    def id(self) -> str:
        """The token."""
        if self._id is None:
            self._id = self.codec.encode(self.place, self._shed)
        return self._id


class _Mark(NamedTuple):
    """A number of the feed from which on it has all that is behind ``position``, and no more."""

    number: int
    position: _Position


@dataclass(eq=False)
class LogClient(RingClient):
    """One browser's position in a feed of the log."""

    _feed: LogFeed
    _known: _Position

    # Whether this process has not read so far as the browser has, or the log is not so long.
    _ahead: bool = False

    def read(self) -> bytes:
        if self._ahead:
            try:
                if not self._feed.tail.reaches(self._known.place):
                    self._lose("unknown_id")
            except (psycopg2.Error, OSError, ConnectError) as error:
                # The browser keeps its position, and comes back with it.
                log.warning(
                    "a browser could not go on, and comes back to try again: %s", error_text(error)
                )
                self.ended = True
                return b""
            self._ahead = False
        return super().read()

    def keepalive(self) -> bytes:
        mark, known = self._feed._latest_mark(), self._known
        if mark.number == self._number and (
            known.codec is not mark.position.codec or known.place < mark.position.place
        ):
            self._known = mark.position
        return super().keepalive()

    def _overtaken(self, start: int, frames: list[bytes]) -> bool:
        self._lose(self._known.lost or "slow")
        return False

    def _lose(self, reason: str) -> None:
        """Say that something may be missing, and go on with what happens from now on."""
        self._number, self._known = self._feed._latest_mark()
        self._lost = reason

    def _tell(self, entries: Any, frames: list[bytes]) -> None:
        # What is at its own place it knows; and it may come from a process that had read further.
        super()._tell([each for each in entries if self._is_new(each)], frames)

    def _is_new(self, entry: Entry) -> bool:
        position, known = entry.position, self._known
        if position.codec is not known.codec or position.place > known.place:
            return True
        # A Gap may have the place of the event before it.
        return position.place == known.place and isinstance(entry.item, Gap)


class LogFeed(RingFeed[LogClient]):
    """The latest events of some targets, from the write-ahead log, for any number of clients."""

    _client = LogClient

    def __init__(self, hub: Hub, tail: WalTail, wanted: Sequence[Wanted], size: int) -> None:
        super().__init__(hub, max(size, KEPT))
        self._wanted = wanted
        self.tail = tail
        self._wants: dict[Topic, bool] = {}
        # All behind this place is in the ring, from this number on.
        self._begin = Place(0)
        self._first = 0
        self._mark: _Mark
        self._codec: PlaceCodec
        tail.attach(self)
        hub._callbacks.streams.add(self)
        if tail.ended:
            # The Hub was stopped meanwhile, and may not have seen this feed.
            self.close()

    def connect(
        self, last_id: str | None, wake: Callable[[], None], view: View = EVERYTHING
    ) -> LogClient:
        client = super().connect(last_id, wake, view)
        known, mark = client._known, self._latest_mark().position
        if known.codec is mark.codec and not known.lost and known.place > mark.place:
            client.waits = client._ahead = True
        return client

    # The tail's reader calls these one after the other.

    def began(self, begin: Place) -> None:
        codec = self.tail.codec
        assert codec is not None
        with self._lock:
            # Those who are connected read what is there, and then the Gap that follows.
            self._codec, self._begin, self._first = codec, begin, self._ring.next
            self._mark = _Mark(self._ring.next, self._at(begin))

    def wants(self, topic: Topic) -> bool:
        if (known := self._wants.get(topic)) is None:
            names = self._hub._registry.names(topic)
            known = self._wants[topic] = any(
                model_identity(target) in names and (not ops or topic.op in ops)
                for target, ops in self._wanted
            )
        return known

    def put(self, items: Sequence[Item], upto: Place) -> None:
        with self._lock:
            for place, item in items:
                turned_out = self._ring.put(Entry(item, self._at(place)))
                if turned_out is not None and turned_out.position.codec is self._codec:
                    self._begin = turned_out.position.place
            self._mark = _Mark(self._ring.next, self._at(upto))
            sleeping = self._take_sleeping() if items else ()
        wake_all(sleeping)

    def _at(self, place: Place, lost: str = "") -> _Position:
        return _Position(place, self._codec, self.tail.shed, lost)

    def _end(self) -> _Position:
        return self._mark.position

    def _find(self, last_id: str) -> tuple[_Position, int] | None:
        found = self._codec.decode(last_id)
        if found is None:
            return None
        place, shed = found
        lost = ""
        if place < self._begin or shed < self.tail.shed:
            lost = "retention"
        elif self.tail.installed_since(place, self.wants):
            lost = "reinstalled"
        return self._at(place, lost), GONE if lost else self._number(place)

    def _number(self, place: Place) -> int:
        """Return the number of the first entry that is not before a place."""
        entries = self._ring.entries
        low, high = max(self._first, self._ring.oldest), self._ring.next
        while low < high:
            middle = (low + high) // 2
            if entries[middle].position.place < place:
                low = middle + 1
            else:
                high = middle
        return low

    def _detach(self) -> None:
        self.tail.detach(self)

    def _latest_mark(self) -> _Mark:
        notice_fork()
        with self._lock:
            return self._mark
