"""Server-sent events from an outbox: a browser that comes back gets exactly what it has missed.

An id is a resume token, good in every process. A feed keeps the latest events, as any other. A
client that is further behind, or comes from elsewhere, reads the outbox again up to a point at
which the feed can take over: the end of one of the windows that the feed itself reads, so that
nothing is left out between the two and nothing comes twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg2

from ..consumers.decoding import Row
from ..core.errors import ConnectError, DatabaseError, StateError
from ..core.events import Event, Gap, Topic, model_identity
from ..core.logging import log
from ..core.process import notice_fork
from ..core.redaction import error_text
from ..hub.hub import Hub
from ..outbox.resume_tokens import ALL, ResumePoint, TokenCodec
from ..postgres.snapshot import Snapshot
from ..sources.tail import Tail
from ..sources.wal_tail import WalTail
from .replayed import LogFeed
from .ring import (
    GONE,
    LONGEST_READ,
    Entry,
    RingClient,
    RingFeed,
    Wanted,
    wake_all,
    wanted_of,
)
from .sse import Feed


def open_feed(hub: Hub, *targets: Any, size: int, ordered: bool) -> RingFeed[Any]:
    """Return the feed that the delivery of the Hub allows.

    Raises ReceiverError if no watcher delivers a target, StateError if the log cannot be read now.
    """
    try:
        tail = hub._tail()
    except DatabaseError as error:
        raise StateError(f"The log cannot be read now: {error}") from error
    if tail is None:
        return Feed(hub, *targets, size=size, ordered=ordered)
    if isinstance(tail, WalTail):
        return LogFeed(hub, tail, check_targets(hub, targets, size), size)
    return ResumableFeed(hub, tail, *targets, size=size)


def check_targets(hub: Hub, targets: Sequence[Any], size: int) -> list[Wanted]:
    """Return the targets, parsed. Raises what ResumableFeed raises for impossible ones."""
    found = wanted_of(targets, size)
    for target, ops in found:
        hub._registry.matcher(target, ops, {})
    return found


class _Position:
    """A point in the outbox: that of an event in a window, or the given one.

    Its token is computed when it is asked for, since most events' ids are sent to nobody.
    """

    __slots__ = ("_event", "_id", "_point", "codec")

    def __init__(self, point: ResumePoint, codec: TokenCodec, event: Event | None = None) -> None:
        self._point = point
        self._event = event
        self._id: str | None = None
        self.codec = codec

    @property
    def point(self) -> ResumePoint:
        """The point."""
        if (event := self._event) is not None:
            self._point = self._point.at(int(event.position or 0), event._number)
            # Not before: another thread here would take the window's point for the event's.
            self._event = None
        return self._point

    @property
    def id(self) -> str:
        """The token."""
        if self._id is None:
            self._id = self.codec.encode(self.point)
        return self._id


@dataclass(frozen=True)
class _Mark:
    """A number of the feed from which on it has all that is behind ``position``, and no more."""

    number: int
    position: _Position

    @property
    def since(self) -> Snapshot:
        """The position's snapshot, which lies between two windows."""
        return self.position.point.since


@dataclass(eq=False)
class ResumableClient(RingClient):
    """One browser's position in a resumable feed.

    The client follows the feed, or, while it is ``_behind``, reads the outbox from the position
    that it knows. Then ``read`` asks the database, and may take as long as that.
    """

    waits = True
    _feed: ResumableFeed
    _known: _Position

    _behind: bool = False
    _goal: _Mark | None = None
    _page: deque[Entry] = field(default_factory=deque)
    _whole: bool = False

    def keepalive(self) -> bytes:
        mark = self._feed._latest_mark()
        at_mark = not self._behind and mark.number == self._number
        if at_mark and self._known.point != mark.position.point:
            self._known = mark.position
        return super().keepalive()

    def _overtaken(self, start: int, frames: list[bytes]) -> bool:
        # The outbox has what the feed no longer holds.
        self._behind = True
        return False

    def _advance(self, frames: list[bytes]) -> bool:
        return self._catch_up(frames) if self._behind else super()._advance(frames)

    def _join(self, mark: _Mark) -> None:
        """Follow the feed from ``mark`` on."""
        self._number, self._known = mark.number, mark.position
        self._behind, self._goal = False, None

    def _catch_up(self, frames: list[bytes]) -> bool:
        """Go on in the outbox; return whether to go on at once."""
        if self._page:
            count = min(len(self._page), LONGEST_READ)
            self._tell([self._page.popleft() for _ in range(count)], frames)
            return True
        codec = self._known.codec
        if codec.epoch != self._feed.codec.epoch:
            self._lose("restored")
            return True
        if self._known.point.target is not None and codec.triggers != self._feed.codec.triggers:
            self._lose("reinstalled")
            return True
        try:
            return self._turn_page()
        except (psycopg2.Error, OSError, ConnectError) as error:
            # The browser keeps its position, and comes back with it.
            log.warning(
                "a browser could not catch up, and comes back to try again: %s", error_text(error)
            )
            self.ended = True
            return False

    def _turn_page(self) -> bool:
        feed = self._feed
        if self._whole:
            self._known, self._whole = self._at(self._known.point.turned()), False
        position, point = self._known, self._known.point
        if point.target is None:
            goal = self._goal
            if goal is not None and goal.since == point.since and feed._is_at_hand(goal):
                self._join(goal)
                return True
            goal = self._goal = feed._latest_mark()
            if not goal.since.covers(point.since):
                # Another process had read further than this one has.
                lost, ahead = feed.tail.check(point)
                if lost or ahead:
                    self._lose("retention" if lost else "unknown_id")
                    return True
                return not feed._await_mark(self, goal) and not feed.closed
            position = self._at(point.towards(goal.since))
            point = position.point
        found = feed.tail.read(point)
        if found.ahead:
            self._lose("unknown_id")
        elif found.lost:
            self._lose("retention")
        elif feed.tail.installed_since(point, feed.wants):
            self._lose("reinstalled")
        else:
            self._known, self._whole = position, found.whole
            for row in found.rows:
                self._decode(row, point)
        return True

    def _decode(self, row: Row, window: ResumePoint) -> None:
        found = self._feed.tail.decode(row)
        behind = self._at(window.at(row.id, ALL))
        if isinstance(found, Gap):
            self._page.append(Entry(found, behind))
        elif found is not None and self._feed.wants(found.topic):
            for number, values in enumerate(found.rows):
                if row.id > window.last_id or number > window.number:
                    event = Event(found, number, values)
                    self._page.append(Entry(event, self._at(window, event)))
        self._page.append(Entry(None, behind))

    def _at(self, point: ResumePoint, event: Event | None = None) -> _Position:
        return _Position(point, self._known.codec, event)

    def _lose(self, reason: str) -> None:
        """Say that something may be missing, and go on with what happens from now on."""
        self._page.clear()
        self._whole = False
        self._join(self._feed._now())
        self._lost = reason


class ResumableFeed(RingFeed[ResumableClient]):
    """The latest events of some targets, from the outbox, for any number of clients.

    Clients are told of the last ``size`` events from memory. Otherwise it is like :class:`Feed`.
    """

    _client = ResumableClient

    def __init__(self, hub: Hub, tail: Tail, *targets: Any, size: int = 1000) -> None:
        self._wanted = check_targets(hub, targets, size)
        super().__init__(hub, size)
        self.tail = tail
        self._wants: dict[Topic, bool] = {}
        self._mark: _Mark
        self.codec = tail.codec
        self._impatient: dict[ResumableClient, None] = {}
        tail.attach(self)
        hub._callbacks.streams.add(self)
        if tail.ended:
            # The Hub was stopped meanwhile, and may not have seen this feed.
            self.close()

    # The tail's reader calls these one after the other.

    def began(self, point: ResumePoint) -> None:
        # Clients read in the outbox what the tail leaves out.
        with self._lock:
            self.codec = self.tail.codec
            self._ring.clear()
            self._mark = _Mark(self._ring.next, _Position(point, self.codec))
            sleeping = self._take_sleeping()
        wake_all(sleeping)

    def wants(self, topic: Topic) -> bool:
        if (known := self._wants.get(topic)) is None:
            names = self._hub._registry.names(topic)
            known = self._wants[topic] = any(
                model_identity(target) in names and (not ops or topic.op in ops)
                for target, ops in self._wanted
            )
        return known

    def take(self, events: Sequence[Event], window: ResumePoint) -> None:
        self._put(Entry(event, _Position(window, self.codec, event)) for event in events)

    def missed(self, gap: Gap) -> None:
        self._put([Entry(gap, self._end())])

    def turned(self, point: ResumePoint) -> None:
        with self._lock:
            self._mark = _Mark(self._ring.next, _Position(point, self.codec))
            impatient, self._impatient = self._impatient, {}
        wake_all(impatient)

    def _put(self, entries: Iterable[Entry]) -> None:
        with self._lock:
            for entry in entries:
                self._ring.put(entry)
            sleeping, self._sleeping = self._sleeping, {}
        wake_all(sleeping)

    def _end(self) -> _Position:
        if self._mark.number == self._ring.next:
            return self._mark.position
        last: _Position = self._ring.entries[self._ring.next - 1].position
        return last

    def _find(self, last_id: str) -> tuple[_Position, int] | None:
        point = self.codec.decode(last_id)
        return None if point is None else (_Position(point, self.codec), self._number(point))

    def _number(self, point: ResumePoint) -> int:
        """Return the number of what follows a point; GONE if the feed does not hold that point."""
        if point == self._mark.position.point and self._mark.number >= self._ring.oldest:
            return self._mark.number
        # The oldest first: a gap has the position of the entry before it, and must be heard.
        for number, entry in self._ring.entries.items():
            if entry.position.point == point:
                return number + 1
        return GONE

    def _detach(self) -> None:
        self.tail.detach(self)

    def _take_sleeping(self) -> Iterable[ResumableClient]:
        impatient, self._impatient = self._impatient, {}
        return [*super()._take_sleeping(), *impatient]

    # Clients call these.

    def _now(self) -> _Mark:
        """Return the end of the feed, where a client begins that has no position to go on from."""
        notice_fork()
        with self._lock:
            return _Mark(self._ring.next, self._end())

    def _latest_mark(self) -> _Mark:
        notice_fork()
        with self._lock:
            return self._mark

    def _is_at_hand(self, mark: _Mark) -> bool:
        with self._lock:
            return mark.number >= self._ring.oldest

    def _await_mark(self, client: ResumableClient, known: _Mark) -> bool:
        """Register a client to be woken at the next mark; False if it is there, or none will be."""
        with self._lock:
            if self._mark is not known or self.closed:
                return False
            self._impatient[client] = None
        self.tail.hurry()
        return True

    def _remove(self, client: ResumableClient) -> None:
        super()._remove(client)
        with self._lock:
            self._impatient.pop(client, None)
