"""Server-sent events for any web framework: the wire format, and one bounded feed for all browsers.

A Feed keeps the latest events once, in a ring. A Client is one browser's place in it, so that a
browser that stops reading holds nothing up and costs no memory: the ring turns, and the browser
gets a ``gap`` when it reads on. Nothing here waits or does I/O: a framework's integration calls
``read`` when its ``wake`` was called, and writes what that gives.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import ConfigurationError
from ..events import Event, Gap, model_identity, model_name
from ..hub import Hub
from ..jsontext import to_json
from ..receivers import Subscription
from ..watchers import EVENT_OPERATIONS, Watcher

log = logging.getLogger("pgsignals")

HEADERS: Mapping[str, str] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    # One browser's view, and nothing on the way may collect it into larger pieces.
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}
KEEPALIVE = b":\n\n"

_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_LONGEST_ID = 4096
LONGEST_READ = 100
# JavaScript's numbers are exact up to here.
_SAFE_INTEGER = 2**53 - 1


def encode(
    data: str | None = None,
    *,
    id: str | None = None,  # noqa: A002
    event: str | None = None,
    retry: int | None = None,
) -> bytes:
    """One message of a ``text/event-stream``. Without ``data`` no listener is called.

    ``id`` is what the browser sends back as Last-Event-ID, ``event`` the type that it is listened
    for by (``message`` without one), ``retry`` after how many milliseconds it connects again.
    Raises ConfigurationError for an ``id`` or ``event`` that would not arrive as it is.
    """
    lines = []
    if retry is not None:
        lines.append(f"retry: {retry}")
    for field, value in (("id", id), ("event", event)):
        if value is None:
            continue
        if _LINE_ENDS.search(value) or "\0" in value or value.startswith(" "):
            raise ConfigurationError(
                f"{field}={value!r}: a text without line ends and NUL that begins with no blank."
            )
        lines.append(f"{field}: {value}")
    if data is not None:
        lines += [f"data: {line}" for line in _LINE_ENDS.split(data)]
    # What is no Unicode (a lone surrogate) would make the whole message unsendable.
    return ("\n".join(lines or [":"]) + "\n\n").encode(errors="replace")


def last_event_id(header: str | None, query: str | None = None) -> str | None:
    """Where a browser wants to go on: the header ``Last-Event-ID``, or else a query parameter.

    The first connection of an EventSource has no such header: a page that was rendered together
    with a feed's ``position`` gives it as a parameter. None when neither is there or sensible.
    """
    for given in (header, query):
        if given and len(given) <= _LONGEST_ID and given.isprintable():
            return given
    return None


def brief(event: Event) -> dict[str, Any]:
    """What a browser is told of an event by default: which record, and nothing that it holds.

    Columns, former values and the context may be more than this user may see; what is fetched by
    the id passes the application's own checks. An ``id`` that JavaScript's numbers cannot hold
    exactly is a text.
    """
    found: dict[str, Any] = {
        "op": event.op,
        "schema": event.schema,
        "table": event.table,
        "id": _exact(event.id),
        "at": event.at,
    }
    if event.label is not None:
        found["label"] = event.label
    return found


def _exact(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_exact(each) for each in value]
    if isinstance(value, int) and abs(value) > _SAFE_INTEGER:
        return str(value)
    return value


@dataclass(frozen=True)
class View:
    """What one client gets of a feed, and how.

    ``visible`` says whether it may know of an event. ``data`` makes what it is told: a text is sent
    as it is (HTML, say), all else as JSON. ``name`` gives the type by which the browser listens,
    ``message`` without one. When one of them raises, the client gets a ``gap`` in place of the
    event: it neither sees what it may not, nor goes without notice.
    """

    visible: Callable[[Event], bool] | None = None
    data: Callable[[Event], Any] | None = None
    name: Callable[[Event], str] | None = None


EVERYTHING = View()


class Waking(Protocol):
    """Who waits for something to read."""

    @property
    def wake(self) -> Callable[[], None]:
        """To be called, from any thread, when there is."""


class _Entry:
    """An event or a gap of the feed, encoded once for all who see it by the same View."""

    __slots__ = ("_frame", "id", "item")

    def __init__(self, id: str, item: Event | Gap) -> None:  # noqa: A002
        self.id = id
        self.item = item
        self._frame: bytes | None = None

    def frame(self, view: View) -> bytes:
        """The message for one client; empty when it may not know of the event."""
        if view != EVERYTHING:
            return render(self.item, view, self.id)
        if self._frame is None:
            self._frame = render(self.item, view, self.id)
        return self._frame


def render(item: Event | Gap, view: View, id: str) -> bytes:  # noqa: A002
    """The message that tells of an event or a gap; empty when it may not be known of."""
    if isinstance(item, Gap):
        return gap_message(item.reason, id, {"since": item.since, "until": item.until})
    try:
        if view.visible is not None and not view.visible(item):
            return b""
        data = (view.data or brief)(item)
        return encode(
            data if isinstance(data, str) else to_json(data),
            id=id,
            event=None if view.name is None else view.name(item),
        )
    except Exception:
        log.exception(
            "what a browser may see could not be told",
            extra={"event_uid": item.uid, **item._message.topic.fields},
        )
        return gap_message("failed", id)


def gap_message(
    reason: str,
    id: str,  # noqa: A002
    times: Mapping[str, Any] | None = None,
) -> bytes:
    """The message that says that something may be missing."""
    # Without the detail: what PostgreSQL says is not for everybody.
    return encode(to_json({"reason": reason, **(times or {})}), id=id, event="gap")


class Feed:
    """The latest events of some targets of a Hub, for any number of clients.

    Each of ``targets`` is a model, a table's name, a label or a watcher, or a tuple of one and
    operations. The last ``size`` events and gaps are kept, and that
    is how far a client may be behind, or may have been away, without missing anything.

    ``ordered`` says that the Hub has one worker, so that all processes see the same order: then an
    id given by one process can be resumed in another. Otherwise an id is good in its own process.

    It ends with the Hub's run, and in the child of a fork: ``closed`` is true, its clients end, and
    a new one is needed. Raises ReceiverError when no watcher delivers a target.
    """

    def __init__(self, hub: Hub, *targets: Any, size: int = 1000, ordered: bool = True) -> None:
        if size < 1:
            raise ConfigurationError(f"size={size!r}: a feed holds at least one event.")
        self._size = size
        self._ordered = ordered
        self._token = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._ring: list[_Entry | None] = [None] * size
        self._next = 0
        self._numbers: dict[str, int] = {}
        # Weak, so that a stream which its server forgets to close does not count for ever.
        self._clients: weakref.WeakSet[Client] = weakref.WeakSet()
        self._sleeping: dict[Client, None] = {}
        self.closed = False
        self._hub = hub
        self._subscriptions: list[Subscription] = []
        if not targets:
            raise ConfigurationError("Give what to send: models, names of tables, or labels.")
        try:
            for target, ops in map(wanted_of, targets):
                self._subscriptions.append(
                    hub._registry.subscribe(
                        self.put, target, ops, {}, f"feed of {model_name(target)}", collects=True
                    )
                )
        except BaseException:
            self._cancel()
            raise
        hub.gap.connect(self._missed)
        hub._streams.add(self)

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self._clients)

    @property
    def position(self) -> str:
        """Where the feed is now: an id from which a client can go on, in this process."""
        with self._lock:
            return self._position(self._next)

    def connect(
        self, last_id: str | None, wake: Callable[[], None], view: View = EVERYTHING
    ) -> Client:
        """A client that goes on after ``last_id``, or gets what happens from now on without one.

        Where ``last_id`` is not known here, its first message is a ``gap``. ``wake`` is called,
        from any thread, once there is something to read after a ``read`` that gave nothing; it
        must not block.
        """
        with self._lock:
            number = None if last_id is None else self._number(last_id)
            client = Client(
                self,
                self._next if number is None else number,
                wake,
                view,
                lost="unknown_id" if last_id is not None and number is None else None,
                resumed=number is not None,
            )
            if not self.closed:
                self._clients.add(client)
        return client

    def put(self, item: Event | Gap) -> None:
        """Append to the feed; called by workers."""
        with self._lock:
            if self.closed:
                return
            key = item.uid if isinstance(item, Event) and self._ordered else None
            if key is not None and key in self._numbers:
                return  # Two targets gave it, or an outbox did so again.
            number = self._next
            at = number % self._size
            if (turned_out := self._ring[at]) is not None:
                self._numbers.pop(turned_out.id, None)
            entry = _Entry(key or self._position(number + 1), item)
            if key is not None:
                self._numbers[key] = number
            self._ring[at] = entry
            self._next = number + 1
            sleeping, self._sleeping = self._sleeping, {}
        wake_all(sleeping)

    def close(self) -> None:
        """End it: clients read what is there, and then are ``ended``. Safe to call twice."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            sleeping, self._sleeping = self._sleeping, {}
        self._cancel()
        wake_all(sleeping)

    def forked(self) -> None:
        """In the child of a fork: the clients are the parent's, and the lock may be held."""
        self._lock = threading.Lock()
        self.closed = True
        self._clients, self._sleeping = weakref.WeakSet(), {}
        self._cancel()

    def _missed(self, hub: Hub, gap: Gap) -> None:
        self.put(gap)

    def _cancel(self) -> None:
        self._hub.gap.disconnect(self._missed)
        for subscription in self._subscriptions:
            subscription.cancel()

    def _position(self, number: int) -> str:
        """An id that means: everything before ``number`` is known."""
        return f"{self._token}.{number}"

    def _number(self, last_id: str) -> int | None:
        """The number of what follows ``last_id``; None when that is not known any more."""
        if (known := self._numbers.get(last_id)) is not None:
            return known + 1
        token, _, digits = last_id.partition(".")
        if token != self._token or not re.fullmatch("[0-9]{1,18}", digits):
            return None
        number = int(digits)
        return number if self._oldest <= number <= self._next else None

    @property
    def _oldest(self) -> int:
        return max(0, self._next - self._size)

    def _read(self, client: Client, number: int) -> tuple[list[_Entry], int, bool]:
        """Entries from ``number`` on, where they begin, and whether some before were lost.

        Without any, the client is woken when there are.
        """
        with self._lock:
            start = max(number, self._oldest)
            stop = min(self._next, start + LONGEST_READ)
            found = [self._ring[each % self._size] for each in range(start, stop)]
            if not found and not self.closed:
                self._sleeping[client] = None
        return [entry for entry in found if entry is not None], start, start > number

    def _remove(self, client: Client) -> None:
        with self._lock:
            self._clients.discard(client)
            self._sleeping.pop(client, None)


class Client:
    """One browser's place in a feed; made by :meth:`Feed.connect`. Used by one thread at a time."""

    def __init__(
        self,
        feed: Feed,
        number: int,
        wake: Callable[[], None],
        view: View,
        lost: str | None,
        resumed: bool,
    ) -> None:
        self._feed = feed
        self._number = number
        self._told = number
        self._view = view
        self._lost = lost
        self._resumed = resumed
        self.wake = wake
        self.ended = False

    def opening(self, retry: int | None = None) -> bytes:
        """The first thing to send: it completes the browser's connection, and gives it an id.

        ``retry`` is after how many milliseconds the browser connects again.
        """
        # An id before the gap would be resumed from, and the gap not be heard; and the id that the
        # browser resumed from may be known in other processes too.
        fresh = self._lost is None and not self._resumed
        return encode(retry=retry, id=self._feed._position(self._number) if fresh else None)

    def read(self) -> bytes:
        """What there is to send.

        Empty when the client is up to date, and then it is woken when it no longer is; or when the
        feed has come to its end, and then ``ended`` is true.
        """
        frames: list[bytes] = []
        while not frames:
            entries, start, lapped = self._feed._read(self, self._number)
            if lapped:
                self._lost = "slow"
            if self._lost is not None:
                frames.append(gap_message(self._lost, self._feed._position(start)))
                self._lost = None
                self._told = start
            self._number = start + len(entries)
            for number, entry in enumerate(entries, start + 1):
                if frame := entry.frame(self._view):
                    frames.append(frame)
                    self._told = number
            if not entries:
                break
        if not frames:
            self.ended = self._feed.closed
        return b"".join(frames)

    def keepalive(self) -> bytes:
        """What to send when there was nothing for a while.

        It moves the browser's id past events that it did not get to see.
        """
        if self._told == self._number:
            return KEEPALIVE
        self._told = self._number
        return encode(id=self._feed._position(self._number))

    def close(self) -> None:
        """Leave the feed. Safe to call twice."""
        self._feed._remove(self)


def wake_all(clients: Iterable[Waking]) -> None:
    for client in clients:
        try:
            client.wake()
        # An event loop that has ended, say: the others are woken all the same.
        except Exception:
            log.debug("a client could not be woken", exc_info=True)


def feed_key(targets: Iterable[Any]) -> Hashable:
    """What makes two feeds have the same events, to share one. Raises what Feed raises."""
    return tuple((model_identity(target), *ops) for target, ops in map(wanted_of, targets))


def wanted_of(target: Any) -> tuple[Any, tuple[str, ...]]:
    """What to listen to, and which operations of it; none stands for all that are delivered.

    Raises ConfigurationError where an operation stands for a target.
    """
    if isinstance(target, Watcher):
        return (target.model if target.label is None else target.label), target.ops
    what, ops = (target[0], target[1:]) if isinstance(target, tuple) and target else (target, ())
    if not what or (isinstance(what, str) and what in EVENT_OPERATIONS):
        raise ConfigurationError(
            f"{target!r} is nothing to send events of: give a model, a table's name, a label, or a "
            "tuple such as ('orders', 'inserted')."
        )
    return what, ops
