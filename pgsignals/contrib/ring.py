"""One bounded feed for all browsers: a ring of the latest events, and each browser's client.

A feed keeps each event once. A client is one browser's position in the feed, so that a browser that
stops reading holds nothing up and costs no memory. Nothing here waits or does I/O, unless a
subclass says so: a framework's integration calls ``read`` once ``wake`` was called, and sends the
bytes that it returns.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from ..core.errors import ConfigurationError
from ..core.events import Event, Gap
from ..core.logging import log
from ..core.process import notice_fork
from ..core.watchers import EVENT_OPERATIONS, Watcher
from ..hub.hub import Hub
from .event_stream import EVERYTHING, KEEPALIVE, View, encode, gap_message, render

LONGEST_READ = 100
# A number that no ring holds any more.
GONE = -1

Wanted = tuple[Any, tuple[str, ...]]
C = TypeVar("C", bound="RingClient")


class Position(Protocol):
    """A position in a feed; a browser that gives its ``id`` goes on from there."""

    @property
    def id(self) -> str:
        """The id."""


class Entry:
    """An event or a gap of a feed, encoded once for all clients that see everything.

    ``position`` is behind the entry, whose message has the id of that position, or an ``own`` one.
    An entry without an item has no message, and only moves its readers on.
    """

    __slots__ = ("_frame", "_own", "item", "position")

    def __init__(self, item: Event | Gap | None, position: Position, own: str = "") -> None:
        self.item = item
        # Any: each kind of feed has positions of its own kind.
        self.position: Any = position
        self._own = own
        self._frame: bytes | None = None

    @property
    def id(self) -> str:
        """The id of the entry's message."""
        return self._own or str(self.position.id)

    def frame(self, view: View) -> bytes:
        """Return the message for one client; empty if the client may not know of the event."""
        if self.item is None:
            return b""
        if view != EVERYTHING:
            return render(self.item, view, self.id)
        if self._frame is None:
            self._frame = render(self.item, view, self.id)
        return self._frame


class Ring:
    """The last ``size`` entries, by numbers that only grow; guarded by the lock of its feed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.entries: dict[int, Entry] = {}
        self.next = 0

    @property
    def oldest(self) -> int:
        """The number of the oldest entry, or of the next one."""
        return self.next - len(self.entries)

    def put(self, entry: Entry) -> Entry | None:
        """Append an entry; return the one that it turns out, if any."""
        self.entries[self.next] = entry
        self.next += 1
        return self.entries.pop(self.next - 1 - self._size, None)

    def clear(self) -> None:
        """Forget all entries, and skip a number, so that clients at the end are behind, too."""
        self.entries.clear()
        self.next += 1

    def page(self, number: int) -> tuple[int, list[Entry]]:
        """Return entries from ``number`` on, or from the oldest, and the number of the first."""
        start = max(number, self.oldest)
        stop = min(self.next, start + LONGEST_READ)
        return start, [self.entries[each] for each in range(start, stop)]


class RingFeed(ABC, Generic[C]):
    """The latest events of some targets of a Hub, for any number of clients.

    The feed ends with the Hub's run, and in the child of a fork: ``closed`` is true, its clients
    end, and a new feed is needed.
    """

    _client: type[C]

    def __init__(self, hub: Hub, size: int) -> None:
        self._hub = hub
        self._ring = Ring(size)
        self._lock = threading.Lock()
        # Weak, so that a stream which its server forgets to close does not count for ever.
        self._clients: weakref.WeakSet[C] = weakref.WeakSet()
        self._sleeping: dict[C, None] = {}
        self.closed = False

    @property
    def clients(self) -> int:
        """The number of clients."""
        notice_fork()
        return len(self._clients)

    @property
    def position(self) -> str:
        """The id of the feed's end, from which a client can go on."""
        notice_fork()
        with self._lock:
            end = self._end()
        return end.id

    def connect(self, last_id: str | None, wake: Callable[[], None], view: View = EVERYTHING) -> C:
        """Return a client that goes on after ``last_id``, or without one gets all from now on.

        If ``last_id`` is not known here, the client's first message is a ``gap``. ``wake`` is
        called, from any thread, once there is something to read after a ``read`` that gave nothing;
        it must not block.
        """
        notice_fork()
        with self._lock:
            found = None if last_id is None else self._find(last_id)
            known, number = found or (self._end(), self._ring.next)
            client = self._client(self, wake, view, known, number, last_id is None)
            if last_id is not None and found is None:
                client._lost = "unknown_id"
            if not self.closed:
                self._clients.add(client)
        return client

    def close(self) -> None:
        """End the feed: clients read what is there, and are ``ended``. Safe to call twice."""
        notice_fork()
        with self._lock:
            if self.closed:
                return
            self.closed = True
            sleeping = self._take_sleeping()
        self._detach()
        wake_all(sleeping)

    def forked(self) -> None:
        """End it in the child of a fork: clients are the parent's, and the lock may be held."""
        self._lock = threading.Lock()
        self.closed = True
        self._clients = weakref.WeakSet()
        self._take_sleeping()

    @abstractmethod
    def _find(self, last_id: str) -> tuple[Position, int] | None:
        """Return an id's position, and its number in the ring or GONE; None for a foreign id."""

    @abstractmethod
    def _end(self) -> Position:
        """Return the position behind all entries."""

    @abstractmethod
    def _detach(self) -> None:
        """Leave the feed's own source."""

    def _take_sleeping(self) -> Iterable[C]:
        sleeping, self._sleeping = self._sleeping, {}
        return sleeping

    def _read(self, client: C, number: int) -> tuple[int, list[Entry]]:
        """Return a page of the ring; if it is empty, the client is woken once there is more."""
        notice_fork()
        with self._lock:
            start, entries = self._ring.page(number)
            if not entries and not self.closed:
                self._sleeping[client] = None
        return start, entries

    def _remove(self, client: C) -> None:
        notice_fork()
        with self._lock:
            self._clients.discard(client)
            self._sleeping.pop(client, None)


@dataclass(eq=False)
class RingClient(ABC):
    """One browser's position in a feed; made by ``connect``, used by one thread at a time."""

    # Whether ``read`` may wait, for the database say.
    waits = False

    _feed: RingFeed[Any]
    wake: Callable[[], None]
    _view: View
    _known: Position
    _number: int
    _fresh: bool
    _lost: str | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        self._told = self._known

    def opening(self, retry: int | None = None) -> bytes:
        """Return the first bytes, which complete the browser's connection, and give it an id.

        The browser connects again after ``retry`` milliseconds.
        """
        # A browser that had an id before the gap would resume from it, and not hear of the gap. The
        # id that it resumed from may be known in other processes, too.
        return encode(retry=retry, id=self._known.id if self._fresh else None)

    def read(self) -> bytes:
        """Return the bytes to send next.

        They are empty if the client is up to date, and then it is woken when it no longer is; or if
        the feed has come to its end, and then ``ended`` is true.
        """
        frames: list[bytes] = []
        more = True
        while more and not frames:
            if self._lost is not None:
                self._tell_gap(self._lost, frames)
                self._lost = None
            more = self._advance(frames)
        if not frames:
            self.ended = self.ended or self._feed.closed
        return b"".join(frames)

    def keepalive(self) -> bytes:
        """Return the bytes to send after a while without any.

        They move the browser's id past events that it did not get to see.
        """
        if self._told is self._known:
            return KEEPALIVE
        self._told = self._known
        return encode(id=self._known.id)

    def close(self) -> None:
        """Leave the feed. Safe to call twice."""
        self._feed._remove(self)

    def _advance(self, frames: list[bytes]) -> bool:
        """Go on with what the feed holds; return whether to go on at once."""
        start, entries = self._feed._read(self, self._number)
        if start > self._number and not self._overtaken(start, frames):
            return True
        self._tell(entries, frames)
        self._number = start + len(entries)
        return bool(entries)

    @abstractmethod
    def _overtaken(self, start: int, frames: list[bytes]) -> bool:
        """Note that the feed holds nothing before ``start``; return whether to go on from there."""

    def _tell(self, entries: Iterable[Entry], frames: list[bytes]) -> None:
        for entry in entries:
            self._known = entry.position
            if frame := entry.frame(self._view):
                frames.append(frame)
                self._told = entry.position

    def _tell_gap(self, reason: str, frames: list[bytes]) -> None:
        frames.append(gap_message(reason, self._known.id))
        self._told = self._known


def wake_all(clients: Iterable[RingClient]) -> None:
    """Wake each client; one that cannot be woken does not stop the others from being woken."""
    for client in clients:
        try:
            client.wake()
        # A client's event loop may have ended, say: the others are woken all the same.
        except Exception:
            log.debug("a client could not be woken", exc_info=True)


def wanted_of(targets: Iterable[Any], size: int = 1) -> list[Wanted]:
    """Return the targets, each with the wanted operations; none stand for all that are delivered.

    Raises ConfigurationError without targets, for an operation in place of one, and for a ``size``
    that a feed cannot have.
    """
    if size < 1:
        raise ConfigurationError(f"size={size!r}: a feed holds at least one event.")
    found = [_wanted(target) for target in targets]
    if not found:
        raise ConfigurationError("Give what to send: models, names of tables, or labels.")
    return found


def _wanted(target: Any) -> Wanted:
    if isinstance(target, Watcher):
        return (target.model if target.label is None else target.label), target.ops
    what, ops = (target[0], target[1:]) if isinstance(target, tuple) and target else (target, ())
    if not what or (isinstance(what, str) and what in EVENT_OPERATIONS):
        raise ConfigurationError(
            f"{target!r} is nothing to send events of: give a model, a table's name, a label, or a "
            "tuple such as ('orders', 'inserted')."
        )
    return what, ops
