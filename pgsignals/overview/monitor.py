"""One thread that reads a database's overview for all who look on, and rests when nobody does."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import psycopg2

from ..core.json import to_json
from ..core.threads import Thread
from ..postgres.waiter import Waiter
from .events import ShownEvent
from .history import POINT_SECONDS, History
from .model import Overview
from .reader import LIVE_SECONDS, MOST_EVENTS, Reader

T = TypeVar("T")

# New events are told of together.
_TOGETHER_SECONDS = 0.25
# Without anybody looking on, the history goes on for this long, a point at a time.
_FORSAKEN_SECONDS = 3600.0
# After a look, the server has so many times the look's time to itself.
_REST = 20


@dataclass(frozen=True)
class Push:
    """What has changed: a part of the overview by its name, as JSON."""

    name: str
    data: str


class Viewer:
    """Somebody who looks on; gets each part of the overview when it has changed."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._seen: dict[str, int] = {}
        self._event = 0

    def wait(self, timeout: float) -> list[Push]:
        """Return what has changed since the last call; empty if nothing does within the time."""
        monitor = self._monitor
        with monitor._changed:
            monitor._changed.wait_for(self._behind, timeout)
            found = []
            for name, (version, data) in monitor._parts.items():
                if self._seen.get(name) != version:
                    self._seen[name] = version
                    found.append(Push(name, data))
            new = [text for number, text in monitor._events if number > self._event]
            if new:
                self._event = monitor._events[-1][0]
                found.append(Push("events", f"[{','.join(new)}]"))
        return found

    def _behind(self) -> bool:
        monitor = self._monitor
        if monitor.closed:
            return True
        if monitor._events and monitor._events[-1][0] > self._event:
            return True
        return any(self._seen.get(name) != each[0] for name, each in monitor._parts.items())


class Monitor:
    """Reads a database's overview in a thread that starts with the first who looks on.

    However many look on, the server is asked once. ``closed`` once ``close`` was called.
    """

    def __init__(self, dsn: str, *, values: bool = False) -> None:
        self._reader = Reader(dsn, values=values)
        self.history = History()
        self.closed = False
        self._using = threading.Lock()
        self._changed = threading.Condition()
        self._parts: dict[str, tuple[int, str]] = {}
        self._events: deque[tuple[int, str]] = deque(maxlen=MOST_EVENTS)
        self._event = 0
        self._viewers = 0
        self._left_at = 0.0
        self._thread: Thread | None = None
        self._waiter: Waiter | None = None

    @property
    def viewers(self) -> int:
        """How many look on."""
        return self._viewers

    def version(self, name: str) -> int:
        """Return a number that grows with each change of a part."""
        with self._changed:
            return self._parts.get(name, (0, ""))[0]

    @contextmanager
    def viewing(self) -> Iterator[Viewer]:
        """Look on."""
        self.enter()
        try:
            yield Viewer(self)
        finally:
            self.leave()

    def enter(self) -> None:
        """Count one more who looks on, and start reading."""
        with self._changed:
            self._viewers += 1
            if self._thread is None and not self.closed:
                self._waiter = Waiter()
                self._thread = Thread("console", self._run, self._waiter)
                self._thread.start()
            elif self._waiter is not None:
                self._waiter.wake()

    def leave(self) -> None:
        """Count one less."""
        with self._changed:
            self._viewers -= 1
            self._left_at = time.monotonic()

    def close(self) -> None:
        """End the thread and the session; those who look on get nothing more."""
        with self._changed:
            self.closed = True
            thread, waiter = self._thread, self._waiter
            self._changed.notify_all()
        if waiter is not None:
            waiter.wake()
        if thread is not None:
            thread.join()
        with self._using:
            self._reader.close()

    def ask(self, question: Callable[[Reader], T], *, look: bool = False) -> T:
        """Ask the reader something from any thread; with ``look``, look at the database soon after.

        Raises what the reader raises: PgSignalsError, psycopg2.Error.
        """
        with self._using:
            try:
                found = question(self._reader)
            except psycopg2.OperationalError:
                self._reader.close()
                raise
        if look:
            self._due = 0.0
            if self._waiter is not None:
                self._waiter.wake()
        return found

    _due = 0.0

    def _run(self, waiter: Waiter) -> None:
        try:
            while not self._ends():
                self._due = float("inf")
                took = self._look()
                rest = max(LIVE_SECONDS, _REST * took)
                self._due = min(self._due, time.monotonic() + rest)
                idle_due = time.monotonic() + max(rest, POINT_SECONDS)
                while not self.closed:
                    now = time.monotonic()
                    due = self._due if self._viewers or not self._due else idle_due
                    if now >= due:
                        break
                    self._hear(waiter, due - now)
        finally:
            with self._changed:
                ours = self._waiter in (waiter, None)
                if ours:
                    self._thread = self._waiter = None
            if ours:
                with self._using:
                    self._reader.close()
            waiter.close()

    def _ends(self) -> bool:
        """Whether to end; whoever looks on from then on starts another thread."""
        with self._changed:
            forsaken = not self._viewers and time.monotonic() - self._left_at > _FORSAKEN_SECONDS
            if self.closed or forsaken:
                self._thread = self._waiter = None
                return True
            return False

    def _look(self) -> float:
        """Read what is due, and tell; return the seconds that it took."""
        began = time.monotonic()
        with self._using:
            watched = self._viewers > 0
            overview = self._reader.read(findings=watched)
            self._reader.listen(watched)
            # What came with the answers to these statements shows on the socket no more.
            events = self._heard()
        took = time.monotonic() - began
        if overview.connected:
            self.history.note(time.monotonic(), overview.consumers)
        self.tell(overview_parts(overview, self.history), [to_json(each) for each in events])
        return took

    def _hear(self, waiter: Waiter, seconds: float) -> None:
        """Wait for notifications for so long, and tell of the events in them."""
        connection = self._reader.connection
        if connection is None or connection.closed:
            waiter.sleep(min(seconds, LIVE_SECONDS), lambda: self.closed)
            return
        try:
            arrived = waiter.wait(connection.fileno(), seconds)
        except psycopg2.Error:
            return  # Somebody's question has found the session lost.
        waiter.forget()
        if not arrived:
            return
        # Those that come together are told of together.
        waiter.sleep(min(seconds, _TOGETHER_SECONDS), lambda: self.closed)
        with self._using:
            events = self._heard()
        self.tell({}, [to_json(each) for each in events])

    def _heard(self) -> list[ShownEvent]:
        """Return the events that have come; a session that is lost is looked after soon."""
        try:
            self._reader.hear()
        except psycopg2.Error:
            self._due = 0.0
            with suppress(psycopg2.Error):
                self._reader.close()
        return self._reader.events()

    def tell(self, parts: Mapping[str, str], events: Sequence[str]) -> None:
        """Tell all who look on of parts, as JSON, that have changed, and of events."""
        with self._changed:
            for name, data in parts.items():
                version, former = self._parts.get(name, (0, None))
                if data != former:
                    self._parts[name] = version + 1, data
            for text in events[-MOST_EVENTS:]:
                self._event += 1
                self._events.append((self._event, text))
            self._changed.notify_all()


def overview_parts(overview: Overview, history: History) -> dict[str, str]:
    """Return the parts of an overview as JSON, each of which is told of when it has changed."""
    lags = {
        key: [(ago, lag.events, lag.bytes, round(lag.seconds, 1)) for ago, lag in points]
        for key, points in history.lags(time.monotonic()).items()
    }
    whole = {
        "state": {
            name: getattr(overview, name)
            for name in (
                *("at", "database", "host", "user", "server", "connected", "problem"),
                *("queue_usage", "outbox"),
            )
        },
        "watchers": overview.watchers,
        "rates": dict(overview.rates),
        "consumers": [{"key": each.key, **_fields(each)} for each in overview.consumers],
        "history": lags,
        "slots": overview.slots,
        "parked": overview.parked,
        "letters": overview.dead_letters,
        "backfills": overview.backfills,
        "findings": {"at": overview.findings_at, "checks": overview.findings},
    }
    return {name: to_json(part) for name, part in whole.items()}


def _fields(value: object) -> dict[str, object]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}  # type: ignore[attr-defined]
