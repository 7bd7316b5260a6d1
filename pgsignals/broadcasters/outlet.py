"""The way out of the process for one broker: a queue and a thread of its own.

Receivers and other brokers are not held up by it, however slow or broken it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from ..backoff import Backoff
from ..events import Event, Gap
from ..metrics import Meter
from . import Broadcaster

log = logging.getLogger("pgsignals")

# Events that are published before they are flushed: large enough that waiting for the broker's
# acknowledgement costs little, small enough to be sent again.
BATCH = 5_000
FLUSH_SECONDS = 5.0


@dataclass(frozen=True)
class BackendStatus:
    """How one broker of ``backends`` stands.

    ``depth`` counts events that wait for its acknowledgement, ``delivered`` those that have it,
    ``lost`` those that were dropped since its queue was full, each of which a Gap has announced;
    ``failures`` counts tries that failed, and ``error`` is why the latest did, empty when the try
    after it succeeded. ``ready``: the latest try succeeded, and nothing is being dropped.

    In outbox delivery, ``active`` is whether this process reads for it, rather than standing by,
    and ``lag`` how old the oldest event is that waits for it here, in seconds.
    """

    name: str
    ready: bool
    depth: int = 0
    delivered: int = 0
    lost: int = 0
    failures: int = 0
    error: str = ""
    active: bool = True
    lag: float = 0.0


class Outlet:
    """Passes events on to one broadcaster in order, again and again until it has taken them.

    ``size`` events wait at most. While there is no room, events are dropped, and a Gap is announced
    to the broadcaster and by ``lost`` once there is.
    """

    def __init__(
        self,
        broadcaster: Broadcaster,
        size: int,
        meter: Meter,
        lost: Callable[[Gap], object],
        *,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self.name = str(broadcaster)
        self._broadcaster = broadcaster
        self._size = size
        self._meter = meter
        self._announce_loss = lost
        self._backoff = backoff()
        self._condition = threading.Condition()
        self._waiting: deque[Event | Gap] = deque()
        self._sending = 0
        self._since: datetime | None = None
        self._until: datetime | None = None
        self._ending = False
        self._gave_up = False
        self._reached = False
        self._delivered = self._lost = self._failures = 0
        self._error = ""
        self._thread = threading.Thread(
            target=self._run, name=f"pgsignals-{self.name}", daemon=True
        )

    def start(self) -> None:
        """Connect, in the background, and send what is published from now on."""
        for counter in ("backend_events", "backend_failures", "backend_lost"):
            self._meter.count(counter, 0, backend=self.name)
        self._meter.gauge("backend_depth", lambda: float(self.depth), backend=self.name)
        self._thread.start()

    def publish(self, events: Sequence[Event]) -> None:
        """Queue events; never waits."""
        with self._condition:
            if self._ending:
                return
            if len(self._waiting) + self._sending >= self._size or self._since is not None:
                # Nothing in between is taken: the Gap must be told before anything later.
                self._drop(events)
                return
            self._waiting.extend(events)
            self._condition.notify_all()

    def _drop(self, events: Sequence[Event]) -> None:
        first, last = events[0].at, events[-1].at
        if self._since is None:
            log.error(
                "%s is too slow or away: its events are dropped until there is room", self.name
            )
        self._since = min(self._since or first, first)
        self._until = max(self._until or last, last)
        self._lost += len(events)
        self._meter.count("backend_lost", len(events), backend=self.name)

    def flush(self, timeout: float) -> bool:
        """Wait until all that was published has arrived; whether it has."""
        with self._condition:
            return self._condition.wait_for(
                lambda: not self._waiting and not self._sending and self._since is None, timeout
            )

    def announce(self, gap: Gap) -> None:
        """Queue a Gap among the events."""
        with self._condition:
            if not self._ending:
                self._waiting.append(gap)
                self._condition.notify_all()

    def stop(self, timeout: float) -> bool:
        """Send what is queued for at most ``timeout`` seconds, then end; whether all was sent."""
        deadline = time.monotonic() + timeout
        drained = self.flush(timeout) if self._thread.is_alive() else not self._waiting
        with self._condition:
            self._ending = True
            self._gave_up = not drained
            self._condition.notify_all()
        if self._thread.ident is not None:
            self._thread.join(max(0.1, deadline - time.monotonic()))
        if not drained:
            log.warning("%d events for %s were not delivered", self.depth, self.name)
        return drained

    @property
    def depth(self) -> int:
        """Events that wait for the broker's acknowledgement."""
        return len(self._waiting) + self._sending

    @property
    def status(self) -> BackendStatus:
        """How it stands now."""
        with self._condition:
            return BackendStatus(
                name=self.name,
                ready=self._reached and not self._error and self._since is None,
                depth=self.depth,
                delivered=self._delivered,
                lost=self._lost,
                failures=self._failures,
                error=self._error,
            )

    def _run(self) -> None:
        try:
            self._try(lambda: self._deliver([]))
            while (batch := self._next()) is not None:
                self._try(lambda batch=batch: self._deliver(batch))  # type: ignore[misc]
                self._arrived(batch)
        finally:
            try:
                self._broadcaster.close()
            except Exception:
                log.exception("%s could not be closed", self.name)

    def _next(self) -> list[Event | Gap] | None:
        """What to send next: some events, or a Gap; None at the end."""
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._ending)
            if not self._waiting or self._gave_up:
                return None
            batch: list[Event | Gap] = [self._waiting.popleft()]
            if not isinstance(batch[0], Gap):
                while (
                    self._waiting and len(batch) < BATCH and not isinstance(self._waiting[0], Gap)
                ):
                    batch.append(self._waiting.popleft())
            self._sending = len(batch)
            return batch

    def _deliver(self, batch: Sequence[Event | Gap]) -> bool:
        if batch and isinstance(batch[0], Gap):
            self._broadcaster.announce(batch[0])
        elif batch:
            self._broadcaster.publish(batch)  # type: ignore[arg-type]
        return self._broadcaster.flush(FLUSH_SECONDS)

    def _try(self, deliver: Callable[[], bool]) -> None:
        """Try until it succeeds or this is told to give up."""
        while not self._gave_up:
            try:
                error = "" if deliver() else f"no acknowledgement within {FLUSH_SECONDS:g} s"
                known = True
            # Whatever a plugin raises: its events wait here, and nobody else's do.
            except Exception as failure:
                error = str(failure) or type(failure).__name__
                known = type(failure).__module__.startswith("pgsignals")
                trace = failure
            if not error:
                self._backoff.reset()
                if self._error:
                    log.info("%s takes events again", self.name)
                self._reached, self._error = True, ""
                return
            if error != self._error:
                log.error(
                    "%s does not take events, trying again: %s",
                    self.name,
                    error,
                    exc_info=None if known else trace,
                    extra={"backend": self.name},
                )
            self._error = error
            self._failures += 1
            self._meter.count("backend_failures", backend=self.name)
            with self._condition:
                self._condition.wait_for(lambda: self._gave_up, self._backoff.next())

    def _arrived(self, batch: Sequence[Event | Gap]) -> None:
        with self._condition:
            if self._gave_up:
                return
            count = 0 if isinstance(batch[0], Gap) else len(batch)
            self._delivered += count
            self._sending = 0
            gap = None
            if self._since is not None and self._until is not None and not self._waiting:
                detail = f"{self.name} did not take events for too long"
                gap = Gap(self._since, self._until, "overflow", detail)
                self._since = self._until = None
                self._waiting.append(gap)
            self._condition.notify_all()
        if count:
            self._meter.count("backend_events", count, backend=self.name)
        if gap is not None:
            self._announce_loss(gap)
