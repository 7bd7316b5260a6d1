"""Server-sent events from an outbox: a browser that comes back gets exactly what it has missed.

An id is a place in the outbox, good in every process. A feed keeps the latest events as another
does; who is further behind, or has been elsewhere, reads the outbox again up to where the feed can
take over: the end of one of the windows that the feed itself reads, so that nothing is left out
between the two and nothing comes twice.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg2

from ..connection import redact
from ..errors import ConfigurationError, ConnectError, DatabaseError, StateError
from ..events import Event, Gap, Topic, model_identity
from ..hub import Hub
from ..outbox.places import ALL, Place, covers
from ..outbox.store import Row
from ..tailing import Tail
from .sse import (
    EVERYTHING,
    KEEPALIVE,
    LONGEST_READ,
    Feed,
    View,
    encode,
    gap_message,
    render,
    wake_all,
    wanted_of,
)

log = logging.getLogger("pgsignals")


def open_feed(hub: Hub, *targets: Any, size: int, ordered: bool) -> Feed | ExactFeed:
    """The feed that the delivery of the Hub allows.

    Raises ReceiverError when no watcher delivers a target, StateError when the outbox cannot be
    read now.
    """
    try:
        tail = hub._tail()
    except DatabaseError as error:
        raise StateError(f"The outbox cannot be read now: {error}") from error
    if tail is None:
        return Feed(hub, *targets, size=size, ordered=ordered)
    return ExactFeed(hub, tail, *targets, size=size)


class _Entry:
    """An event or a gap of the feed; its id is worked out when somebody wants it."""

    __slots__ = ("_feed", "_frame", "_id", "_place", "_window", "item")

    def __init__(self, feed: ExactFeed, item: Event | Gap, window: Place) -> None:
        self._feed = feed
        self.item = item
        self._window = window
        self._place: Place | None = None
        self._id: str | None = None
        self._frame: bytes | None = None

    @property
    def place(self) -> Place:
        """Where whoever has got it is."""
        if self._place is None:
            self._place = self._window
            if isinstance(self.item, Event):
                self._place = _place_of(self.item, self._window)
        return self._place

    def frame(self, view: View) -> bytes:
        """The message for one client; empty when it may not know of the event."""
        if self._id is None:
            self._id = self._feed.sign(self.place)
        if view != EVERYTHING:
            return render(self.item, view, self._id)
        if self._frame is None:
            self._frame = render(self.item, view, self._id)
        return self._frame


@dataclass(frozen=True)
class _Mark:
    """At a number of the feed: everything from there on, and nothing else, is behind a place.

    Numbers mean nothing to another ``generation``.
    """

    generation: int
    number: int
    place: Place


class ExactFeed:
    """The latest events of some targets, from the outbox, for any number of clients.

    Of the last ``size`` events clients are told from memory. Otherwise it is as :class:`Feed`.
    """

    def __init__(self, hub: Hub, tail: Tail, *targets: Any, size: int = 1000) -> None:
        if size < 1:
            raise ConfigurationError(f"size={size!r}: a feed holds at least one event.")
        if not targets:
            raise ConfigurationError("Give what to send: models, names of tables, or labels.")
        self._hub = hub
        self.tail = tail
        self._size = size
        self._targets = [wanted_of(each) for each in targets]
        for target, ops in self._targets:
            hub._registry.matcher(target, ops, {})
        self._wanted: dict[Topic, bool] = {}
        self._lock = threading.Lock()
        self._generation = 0
        self._next = 0
        self._ring: list[_Entry | None] = [None] * size
        self._mark: _Mark
        self._clients: weakref.WeakSet[ExactClient] = weakref.WeakSet()
        self._sleeping: dict[ExactClient, None] = {}
        self._impatient: dict[ExactClient, None] = {}
        self.closed = False
        tail.attach(self)
        hub._streams.add(self)

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self._clients)

    @property
    def position(self) -> str:
        """Where the feed is now: an id from which a client can go on, in any process."""
        with self._lock:
            place = self._place()
        return self.sign(place)

    def sign(self, place: Place) -> str:
        """The id of a place."""
        return self.tail.signer.sign(place)

    def connect(
        self, last_id: str | None, wake: Callable[[], None], view: View = EVERYTHING
    ) -> ExactClient:
        """See :meth:`Feed.connect`."""
        place = None if last_id is None else self.tail.signer.read(last_id)
        with self._lock:
            client = ExactClient(self, wake, view, resumed=place is not None)
            if place is None:
                client._join(self._generation, self._next, self._place())
                client._lost = None if last_id is None else "unknown_id"
            elif (number := self._number(place)) is not None:
                client._join(self._generation, number, place)
            else:
                client._known = place
            if not self.closed:
                self._clients.add(client)
        return client

    def close(self) -> None:
        """End it: clients read what is there, and then are ``ended``. Safe to call twice."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            sleeping = self._take_sleeping()
        self.tail.detach(self)
        wake_all(sleeping)

    def forked(self) -> None:
        """In the child of a fork: the clients are the parent's, and the lock may be held."""
        self._lock = threading.Lock()
        self.closed = True
        self._clients, self._sleeping, self._impatient = weakref.WeakSet(), {}, {}

    # What the tail tells.

    def began(self, place: Place) -> None:
        """See Reader: clients read again what the tail leaves out."""
        with self._lock:
            self._generation += 1
            self._ring = [None] * self._size
            self._next = 0
            self._mark = _Mark(self._generation, 0, place)
            sleeping = self._take_sleeping()
        wake_all(sleeping)

    def wants(self, topic: Topic) -> bool:
        """See Reader."""
        if (known := self._wanted.get(topic)) is None:
            names = self._hub._registry.names(topic)
            known = self._wanted[topic] = any(
                model_identity(target) in names and (not ops or topic.op in ops)
                for target, ops in self._targets
            )
        return known

    def take(self, events: Sequence[Event], window: Place) -> None:
        """See Reader."""
        with self._lock:
            for event in events:
                self._put(_Entry(self, event, window))
            sleeping, self._sleeping = self._sleeping, {}
        wake_all(sleeping)

    def turned(self, place: Place) -> None:
        """See Reader."""
        with self._lock:
            self._mark = _Mark(self._generation, self._next, place)
            impatient, self._impatient = self._impatient, {}
        wake_all(impatient)

    def missed(self, gap: Gap) -> None:
        """See Reader."""
        with self._lock:
            self._put(_Entry(self, gap, self._place()))
            sleeping, self._sleeping = self._sleeping, {}
        wake_all(sleeping)

    def _put(self, entry: _Entry) -> None:
        self._ring[self._next % self._size] = entry
        self._next += 1

    def _place(self) -> Place:
        """What somebody knows who knows all that there is."""
        if self._mark.number == self._next:
            return self._mark.place
        last = self._ring[(self._next - 1) % self._size]
        assert last is not None
        return last.place

    def _number(self, place: Place) -> int | None:
        """The number of what follows a place, where it is one of the feed's own."""
        if place == self._mark.place and self._mark.number >= self._oldest:
            return self._mark.number
        # The oldest first: a gap has the place of what comes before it, and must be heard.
        for number in range(self._oldest, self._next):
            entry = self._ring[number % self._size]
            if entry is not None and entry.place == place:
                return number + 1
        return None

    @property
    def _oldest(self) -> int:
        return max(0, self._next - self._size)

    def _take_sleeping(self) -> list[ExactClient]:
        found = [*self._sleeping, *self._impatient]
        self._sleeping, self._impatient = {}, {}
        return found

    # What its clients ask.

    def _read(self, client: ExactClient, generation: int, number: int) -> list[_Entry] | None:
        """Entries from ``number`` on; None where they are not here any more.

        Without any, the client is woken when there are.
        """
        with self._lock:
            if generation != self._generation or number < self._oldest:
                return None
            stop = min(self._next, number + LONGEST_READ)
            found = [self._ring[each % self._size] for each in range(number, stop)]
            if not found and not self.closed:
                self._sleeping[client] = None
        return [entry for entry in found if entry is not None]

    def _now(self) -> tuple[int, int, Place]:
        """Where whoever begins now begins: generation, number and place."""
        with self._lock:
            return self._generation, self._next, self._place()

    def _latest_mark(self) -> _Mark:
        with self._lock:
            return self._mark

    def _is_at_hand(self, mark: _Mark) -> bool:
        with self._lock:
            return mark.generation == self._generation and mark.number >= self._oldest

    def _await_mark(self, client: ExactClient, known: _Mark) -> bool:
        """Have the client woken at the next mark; False when it is there, or none will be."""
        with self._lock:
            if self._mark is not known or self.closed:
                return False
            self._impatient[client] = None
        self.tail.hurry()
        return True

    def _remove(self, client: ExactClient) -> None:
        with self._lock:
            self._clients.discard(client)
            self._sleeping.pop(client, None)
            self._impatient.pop(client, None)


class ExactClient:
    """One browser's place in an exact feed; used as :class:`Client` is.

    It either follows the feed, by ``_number``, or, without one, reads the outbox from what it
    knows. Then ``read`` asks the database, and may take as long as that.
    """

    def __init__(
        self, feed: ExactFeed, wake: Callable[[], None], view: View, resumed: bool
    ) -> None:
        self._feed = feed
        self._view = view
        self._resumed = resumed
        self._known: Place | _Entry
        self._told: Place | _Entry | None = None
        self._generation = 0
        self._number: int | None = None
        self._goal: _Mark | None = None
        self._page: deque[tuple[Place, Event | Gap | None]] = deque()
        self._whole = False
        self._lost: str | None = None
        self._epoch = feed.tail.signer.epoch
        self.wake = wake
        self.ended = False

    def opening(self, retry: int | None = None) -> bytes:
        """See :meth:`Client.opening`."""
        fresh = self._lost is None and not self._resumed
        self._told = self._known
        return encode(retry=retry, id=self._feed.sign(self._place) if fresh else None)

    def read(self) -> bytes:
        """See :meth:`Client.read`."""
        frames: list[bytes] = []
        more = True
        while more and not frames:
            if self._lost is not None:
                frames.append(gap_message(self._lost, self._feed.sign(self._place)))
                self._told, self._lost = self._known, None
            elif self._number is not None:
                more = self._follow(self._number, frames)
            else:
                more = self._catch_up(frames)
        if not frames:
            self.ended = self.ended or self._feed.closed
        return b"".join(frames)

    def keepalive(self) -> bytes:
        """See :meth:`Client.keepalive`."""
        mark = self._feed._latest_mark()
        at_mark = (mark.generation, mark.number) == (self._generation, self._number)
        if at_mark and self._place != mark.place:
            self._known = mark.place
        if self._told is self._known:
            return KEEPALIVE
        self._told = self._known
        return encode(id=self._feed.sign(self._place))

    def close(self) -> None:
        """Leave the feed. Safe to call twice."""
        self._feed._remove(self)

    @property
    def _place(self) -> Place:
        return self._known.place if isinstance(self._known, _Entry) else self._known

    def _join(self, generation: int, number: int, place: Place) -> None:
        """Follow the feed from here on."""
        self._generation, self._number, self._known = generation, number, place
        self._epoch = self._feed.tail.signer.epoch
        self._goal = None

    def _follow(self, number: int, frames: list[bytes]) -> bool:
        entries = self._feed._read(self, self._generation, number)
        if entries is None:
            self._number = None
            return True
        for entry in entries:
            self._known = entry
            if frame := entry.frame(self._view):
                frames.append(frame)
                self._told = entry
        self._number = number + len(entries)
        return bool(entries)

    def _catch_up(self, frames: list[bytes]) -> bool:
        """Go on in the outbox; whether there may be more to do at once."""
        if self._page:
            self._tell(frames)
            return True
        if self._epoch != self._feed.tail.signer.epoch:
            self._lose("restored")
            return True
        try:
            return self._turn_page()
        except (psycopg2.Error, OSError, ConnectError) as error:
            # It keeps its place, and comes back with it.
            log.warning("a browser could not catch up: %s", redact(str(error)).strip())
            self.ended = True
            return False

    def _tell(self, frames: list[bytes]) -> None:
        while self._page and len(frames) < LONGEST_READ:
            place, item = self._page.popleft()
            self._known = place
            if item is None:
                continue
            if frame := render(item, self._view, self._feed.sign(place)):
                frames.append(frame)
                self._told = self._known

    def _turn_page(self) -> bool:
        feed = self._feed
        if self._whole:
            self._known, self._whole = self._place.turned(), False
        place = self._place
        if place.target is None:
            goal = self._goal
            if goal is not None and goal.place.since == place.since and feed._is_at_hand(goal):
                self._join(goal.generation, goal.number, goal.place)
                return True
            goal = self._goal = feed._latest_mark()
            if not covers(goal.place.since, place.since):
                # Another process had read further than this one has.
                lost, ahead = feed.tail.check(place)
                if lost or ahead:
                    self._lose("retention" if lost else "unknown_id")
                    return True
                return not feed._await_mark(self, goal) and not feed.closed
            place = place.towards(goal.place.since)
        found = feed.tail.read(place)
        if found.ahead:
            self._lose("unknown_id")
        elif found.lost:
            self._lose("retention")
        elif feed.tail.installed_since(place, feed.wants):
            self._lose("reinstalled")
        else:
            self._known, self._whole = place, found.whole
            for row in found.rows:
                self._decode(row, place)
        return True

    def _decode(self, row: Row, window: Place) -> None:
        found = self._feed.tail.decode(row)
        if isinstance(found, Gap):
            self._page.append((window.at(row.id, ALL), found))
        elif found is not None and self._feed.wants(found.topic):
            for number, values in enumerate(found.rows):
                event = Event(found, number, values)
                if row.id > window.last_id or number > window.number:
                    self._page.append((_place_of(event, window), event))
        self._page.append((window.at(row.id, ALL), None))

    def _lose(self, reason: str) -> None:
        """Say that something may be missing, and go on with what happens from now on."""
        self._page.clear()
        self._whole = False
        self._join(*self._feed._now())
        self._lost = reason


def _place_of(event: Event, window: Place) -> Place:
    return window.at(int(event.position or 0), event._number)
