"""The forwarder to one broker: a queue and a thread of its own.

A broker, however slow or broken, holds up neither receivers nor other brokers.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import NamedTuple

from ..core.backoff import Backoff
from ..core.errors import PgSignalsError, PluginError
from ..core.events import Event, Gap
from ..core.logging import ErrorInfo, error_info, log
from ..core.metrics import Meter
from ..core.redaction import error_text, legible
from ..core.threads import Thread
from ..plugins.broadcaster import Broadcaster, Pipelined
from .backend_status import BackendStatus
from .in_flight import Page

# Events that are published before they are flushed: large enough that waiting for the broker's
# acknowledgement costs little, small enough to be sent again.
BATCH = 5_000
# Events under way to a broker that tells how far it is, and those that are published before it is
# asked again.
WINDOW = 10_000
CHUNK = 500
FLUSH_SECONDS = 5.0


class Item(NamedTuple):
    """Events or a Gap that wait for the broker, and the page that is acknowledged with them."""

    events: Sequence[Event]
    page: Page | None
    gap: Gap | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the lease holds, so that no other process may have taken the item over."""
        return self.page is None or self.page.lease.holds()


class Forwarder:
    """Hands events on to one broadcaster in order, again and again until it has taken them.

    At most ``size`` events wait. With ``lost``, events without room are dropped, and a Gap is
    announced to the broadcaster, and by ``lost``, once there is room. Without ``lost`` nothing is
    dropped, and the source must look at ``full`` before it submits.
    """

    def __init__(
        self,
        broadcaster: Broadcaster,
        size: int,
        meter: Meter,
        lost: Callable[[Gap], object] | None = None,
    ) -> None:
        self.name = legible(str(broadcaster), 200)
        self._broadcaster = broadcaster
        self._size = size
        self._meter = meter
        self._announce_loss = lost
        self._backoff = Backoff()
        self._condition = threading.Condition()
        self._pipelined = broadcaster if isinstance(broadcaster, Pipelined) else None
        self._most = BATCH if self._pipelined is None else WINDOW
        self._waiting: deque[Item] = deque()
        # Items that are being published, until the broker has acknowledged them, and how many of
        # their events are under way: of the first item, ``_ahead`` have arrived, and of the last,
        # ``_unsent`` have yet to be published.
        self._under_way: deque[Item] = deque()
        self._sent = self._ahead = self._unsent = 0
        # Whether what is under way is to be published again, since something failed.
        self._again = False
        # Whether the broadcaster may have events that it has not acknowledged.
        self._published = False
        self._depth = 0
        self._since: datetime | None = None
        self._until: datetime | None = None
        self._ending = self._reached = False
        self._delivered = self._lost = self._failures = 0
        self._error = ""
        self._thread = Thread(self.name, self._run)

    @property
    def failure(self) -> str:
        """The error that has ended the thread; empty if there was none."""
        return self._thread.failure

    @property
    def full(self) -> bool:
        """Whether ``size`` events wait."""
        return self._depth >= self._size

    @property
    def status(self) -> BackendStatus:
        """The broker's status now."""
        with self._condition:
            error = self.failure or self._error
            return BackendStatus(
                name=self.name,
                ready=self._reached and not error and self._since is None,
                depth=self._depth,
                delivered=self._delivered,
                lost=self._lost,
                failures=self._failures,
                error=error,
            )

    def start(self) -> None:
        """Connect, in the background, and send what is submitted from now on."""
        for counter in ("backend_events", "backend_failures"):
            self._meter.count(counter, 0, backend=self.name)
        if self._announce_loss is not None:
            self._meter.count("backend_lost", 0, backend=self.name)
        self._meter.gauge("backend_depth", lambda: float(self._depth), backend=self.name)
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Send what is queued for at most ``timeout`` seconds, end, and return if all was sent."""
        deadline = time.monotonic() + timeout

        def sent() -> bool:
            return not self._waiting and not self._under_way and self._since is None

        with self._condition:
            if self._thread.is_alive():
                self._condition.wait_for(sent, timeout)
            drained = sent()
            self._ending = True
            self._condition.notify_all()
        self._thread.join(max(0.1, deadline - time.monotonic()))
        if not self._thread.began:
            self._broadcaster.close()
        if not drained and self._announce_loss is not None:
            log.warning("%d events for %s were not delivered", self._depth, self.name)
        return drained

    def abandon(self) -> None:
        """In the child of a fork, forget what waits, which the parent sends."""
        self._condition = threading.Condition()
        self._waiting.clear()
        self._under_way.clear()
        self._depth = self._sent = self._ahead = self._unsent = 0

    def submit_page(self, events: Sequence[Event], page: Page | None = None) -> None:
        """Queue events; never waits. ``page`` is acknowledged once the broker has them."""
        self._submit(Item(events, page))

    def gap(self, gap: Gap, page: Page | None = None) -> None:
        """Queue a Gap among the events."""
        self._submit(Item((), page, gap))

    def _submit(self, item: Item) -> None:
        with self._condition:
            if self._ending:
                return
            dropping = self._announce_loss is not None and (self.full or self._since is not None)
            if dropping and item.events:
                # Nothing in between is taken: the Gap must be told before anything later.
                self._drop(item.events)
                return
            self._waiting.append(item)
            self._depth += len(item.events)
            self._condition.notify_all()

    def _drop(self, events: Sequence[Event]) -> None:
        first, last = events[0].at, events[-1].at
        if self._since is None:
            log.error(
                "%s is too slow or away: its events are dropped until there is room, and a Gap is "
                "announced",
                self.name,
            )
        self._since = min(self._since or first, first)
        self._until = max(self._until or last, last)
        self._lost += len(events)
        self._meter.count("backend_lost", len(events), backend=self.name)

    def _run(self) -> None:
        try:
            while self._await_work():
                try:
                    taken = self._turn()
                # Whatever a plugin raises: its events wait here, and hold up nobody else.
                except BaseException as error:
                    own = isinstance(error, PgSignalsError)
                    self._failed(error_text(error), None if own else error_info(error))
                else:
                    if not taken:
                        self._failed(f"no acknowledgement within {FLUSH_SECONDS:g} s")
        finally:
            # Closed by this thread: if another closed it during a flush, the flush might return as
            # though the broker had taken the events.
            try:
                self._broadcaster.close()
            except BaseException:
                log.exception("%s could not be closed", self.name)

    def _await_work(self) -> bool:
        """Wait until there is something to send; return False at the end."""
        with self._condition:
            # Once without events, so that a broker which is away shows before there are some.
            self._condition.wait_for(
                lambda: self._waiting or self._under_way or self._ending or not self._reached
            )
            return not self._ending

    def _turn(self) -> bool:
        """Publish, and see to what has arrived; return whether the broker takes events."""
        if self._published and self._taken_over():
            self._published, self._again = False, True
            self._broadcaster.close()
        if not self._forget_lost():
            return False
        self._publish(self._take_again() if self._again else self._take())
        self._again = False
        # Nothing goes behind a Gap until that has arrived: it is no event that could be counted.
        telling = bool(self._under_way) and self._under_way[-1].gap is not None
        full = self._sent >= self._most
        if not telling and (full or self._unsent or self._waiting):
            if not full:
                self._done(0 if self._pipelined is None else self._pipelined.arrived(0.0))
                return True
            if self._pipelined is not None:
                arrived = self._pipelined.arrived(FLUSH_SECONDS)
                self._done(arrived)
                return arrived > 0
        return self._flush()

    def _taken_over(self) -> bool:
        """Whether another process may send what the broadcaster has."""
        return False

    def _take(self) -> list[Event]:
        """Return the next events, which are under way from now on."""
        events: list[Event] = []
        with self._condition:
            room = min(CHUNK, self._most - self._sent)
            while room > 0:
                if not self._unsent:
                    if not self._waiting:
                        break
                    item = self._waiting.popleft()
                    if not item.is_ours:
                        self._depth -= len(item.events)
                        continue
                    self._under_way.append(item)
                    self._unsent = len(item.events)
                    if item.gap is not None:
                        break
                found = self._under_way[-1].events
                start = len(found) - self._unsent
                part = found[start : start + room]
                events += part
                self._unsent -= len(part)
                room -= len(part)
            self._sent += len(events)
        return events

    def _take_again(self) -> list[Event]:
        """Return the events that are under way, but for those that have arrived."""
        events = [event for item in self._under_way for event in item.events]
        return events[self._ahead : self._ahead + self._sent]

    def _publish(self, events: Sequence[Event]) -> None:
        self._published = self._published or bool(self._under_way)
        if events:
            self._broadcaster.publish(events)
        if self._under_way and (gap := self._under_way[-1].gap) is not None:
            self._broadcaster.announce(gap)

    def _flush(self) -> bool:
        if not self._broadcaster.flush(FLUSH_SECONDS):
            return False
        self._published = False
        self._done(self._sent, flushed=True)
        return True

    def _forget_lost(self) -> bool:
        """Forget items under way whose leases are over, which are read again; or return False.

        A broadcaster that counts gets nothing before it has no more of them. Otherwise its count
        would be wrong, and what it has forgotten would be overtaken by what it has not. Leases end
        one after another.
        """
        items = self._under_way
        if not items or (items[0].is_ours and items[-1].is_ours):
            return True
        if self._pipelined is not None and self._published:
            if not self._broadcaster.flush(FLUSH_SECONDS):
                return False
            self._published = False
            if not self._again:
                self._done(self._sent, flushed=True)
        with self._condition:
            outstanding = self._sent + self._unsent
            # Once for each: a lease may end at any moment.
            ours = [item.is_ours for item in items]
            if items and not ours[0]:
                self._ahead = 0
            if items and not ours[-1]:
                self._unsent = 0
            self._under_way = deque(itertools.compress(items, ours))
            left = sum(len(item.events) for item in self._under_way) - self._ahead
            self._sent = left - self._unsent
            self._depth -= outstanding - left
            self._condition.notify_all()
        return True

    def _done(self, count: int, flushed: bool = False) -> None:
        """Take care of ``count`` further events that have arrived; ``flushed``: Gaps, too."""
        if not (count or flushed):
            return
        if self._error:
            log.info("%s takes events again", self.name)
        self._reached, self._error = True, ""
        self._backoff.reset()
        arrived = self._ahead + count
        if arrived > self._sent:
            # Of a plugin that counts too much, what has not arrived would be acknowledged.
            raise PluginError(f"{self.name} counts {arrived} events of {self._sent} as arrived")
        done: list[Item] = []
        for item in self._under_way:
            if len(item.events) > arrived or (item.gap is not None and not flushed):
                break
            done.append(item)
            arrived -= len(item.events)
        delivered = 0
        for item in done:
            # Items that another process has taken over must not be counted.
            if item.is_ours:
                delivered += len(item.events)
                if item.page is not None:
                    item.page.acknowledge()
        with self._condition:
            self._ahead = arrived
            self._sent -= count
            self._depth -= count
            for _ in done:
                self._under_way.popleft()
            self._delivered += delivered
            idle = not (self._waiting or self._under_way or self._ending)
            gap = self._end_loss() if idle else None
            self._condition.notify_all()
        self._meter.count("backend_events", delivered, backend=self.name)
        if gap is not None and self._announce_loss is not None:
            self._announce_loss(gap)

    def _end_loss(self) -> Gap | None:
        """Take events again, and first the Gap of those that were dropped; return that Gap."""
        if self._since is None or self._until is None:
            return None
        detail = f"{self.name} did not take events for too long"
        gap = Gap(self._since, self._until, "overflow", detail)
        self._since = self._until = None
        self.gap(gap)
        return gap

    def _failed(self, reason: str, trace: ErrorInfo | None = None) -> None:
        if reason != self._error:
            # A warning where nothing is dropped: events only come late.
            drops = self._announce_loss is not None
            log.log(
                logging.ERROR if drops else logging.WARNING,
                "%s does not take events, trying again: %s",
                self.name,
                reason,
                exc_info=trace if drops else None,
                extra={"backend": self.name},
            )
        self._error = reason
        self._failures += 1
        self._again = True
        self._meter.count("backend_failures", backend=self.name)
        with self._condition:
            self._condition.wait_for(lambda: self._ending, self._backoff.next())
