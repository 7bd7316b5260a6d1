"""The forwarder to one broker: a queue and a thread of its own.

A broker, however slow or broken, holds up neither receivers nor other brokers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import NamedTuple

from ..core.backoff import Backoff
from ..core.errors import PgSignalsError
from ..core.events import Event, Gap
from ..core.logging import ErrorInfo, error_info, log
from ..core.metrics import Meter
from ..core.redaction import error_text, legible
from ..core.threads import Thread
from ..plugins.broadcaster import Broadcaster
from .backend_status import BackendStatus
from .in_flight import Page

# Events that are published before they are flushed: large enough that waiting for the broker's
# acknowledgement costs little, small enough to be sent again.
BATCH = 5_000
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
        # Items that are being sent stay here, too, until the broker has acknowledged them.
        self._waiting: deque[Item] = deque()
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
            return not self._waiting and self._since is None

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
        self._depth = 0

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
            while (taken := self._take()) is not None:
                # Items that another process has taken over must be neither delivered nor counted.
                ours = [item for item in taken if item.is_ours]
                try:
                    delivered = self._deliver(ours)
                # Whatever a plugin raises: its events wait here, and hold up nobody else.
                except BaseException as error:
                    own = isinstance(error, PgSignalsError)
                    self._failed(error_text(error), None if own else error_info(error))
                    continue
                if delivered:
                    self._done(taken, ours)
                else:
                    self._failed(f"no acknowledgement within {FLUSH_SECONDS:g} s")
        finally:
            # Closed by this thread: if another closed it during a flush, the flush might return as
            # though the broker had taken the events.
            try:
                self._broadcaster.close()
            except BaseException:
                log.exception("%s could not be closed", self.name)

    def _take(self) -> list[Item] | None:
        """Return the next items, which stay queued until they are acknowledged; None at the end."""
        with self._condition:
            # Once without events, so that a broker which is away shows before there are some.
            self._condition.wait_for(lambda: self._waiting or self._ending or not self._reached)
            if self._ending:
                return None
            self._forget_lost()
            taken: list[Item] = []
            count = 0
            for item in self._waiting:
                if count >= BATCH:
                    break
                taken.append(item)
                count += len(item.events)
            return taken

    def _forget_lost(self) -> None:
        """Forget items whose leases are over, which are read again; with the lock held."""
        kept = [item for item in self._waiting if item.is_ours]
        if len(kept) < len(self._waiting):
            self._waiting = deque(kept)
            self._depth = sum(len(item.events) for item in kept)
            self._condition.notify_all()

    def _deliver(self, items: Sequence[Item]) -> bool:
        for item in items:
            if item.gap is not None:
                self._broadcaster.announce(item.gap)
            elif item.events:
                self._broadcaster.publish(item.events)
        return bool(self._broadcaster.flush(FLUSH_SECONDS))

    def _done(self, taken: Sequence[Item], ours: Sequence[Item]) -> None:
        if self._error:
            log.info("%s takes events again", self.name)
        self._reached, self._error = True, ""
        self._backoff.reset()
        for item in ours:
            if item.page is not None:
                item.page.acknowledge()
        delivered = sum(len(item.events) for item in ours)
        self._meter.count("backend_events", delivered, backend=self.name)
        with self._condition:
            self._delivered += delivered
            for item in taken:
                self._waiting.popleft()
                self._depth -= len(item.events)
            gap = None if self._waiting or self._ending else self._end_loss()
            self._condition.notify_all()
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
        self._meter.count("backend_failures", backend=self.name)
        with self._condition:
            self._condition.wait_for(lambda: self._ending, self._backoff.next())
