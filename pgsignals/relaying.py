"""One broadcaster in outbox delivery, with a cursor of its own, which moves as it acknowledges."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .backoff import Backoff
from .broadcasters import Broadcaster
from .broadcasters.outlet import BATCH, FLUSH_SECONDS, BackendStatus
from .connection import redact
from .events import Event, Gap, Topic
from .metrics import Meter
from .outbox.pages import Page
from .outbox.store import DeadLetter
from .runs import Settings
from .sources.claims import Consumer
from .sources.outbox import OutboxPreparer, OutboxSource

log = logging.getLogger("pgsignals")


@dataclass(frozen=True)
class _Item:
    """What waits for the broker, events or a Gap, and the page that is done once it has it."""

    page: Page | None
    events: Sequence[Event]
    gap: Gap | None = None


class Relay:
    """Reads the outbox for one broadcaster, and acknowledges what that has acknowledged.

    It is its source's sink. What the broadcaster refuses or does not acknowledge is published
    again, in its order, until it does: nothing is dropped, and nobody else waits for it.
    """

    def __init__(
        self,
        broadcaster: Broadcaster,
        settings: Settings,
        preparer: OutboxPreparer,
        consumer: Consumer,
        meter: Meter,
    ) -> None:
        self._broadcaster = broadcaster
        self._size = settings.queue_size
        self._meter = meter
        self.name = str(broadcaster)
        self.source = OutboxSource(
            settings.dsn,
            settings.listen_dsn,
            preparer,
            self,
            settings.timing,
            meter,
            consumer,
            2 * settings.queue_size,
        )
        self._condition = threading.Condition()
        self._waiting: deque[_Item] = deque()
        self._depth = 0
        self._ending = False
        self._backoff = Backoff()
        self._delivered = self._failures = 0
        self._error = ""
        self._reached = False
        # Whether the broadcaster has something that it has not acknowledged.
        self._published = False
        self._thread = threading.Thread(
            target=self._run, name=f"pgsignals-{self.name}", daemon=True
        )

    @property
    def full(self) -> bool:
        """See DurableSink."""
        return self._depth >= self._size

    @property
    def status(self) -> BackendStatus:
        """How it stands now."""
        return BackendStatus(
            name=self.name,
            ready=self._reached and not self._error,
            depth=self._depth,
            delivered=self._delivered,
            failures=self._failures,
            error=self._error,
            active=self.source.is_active,
            lag=self._lag,
        )

    @property
    def _lag(self) -> float:
        """How old, in seconds, the oldest event is that has yet to be acknowledged."""
        with self._condition:
            first = next((item.events[0] for item in self._waiting if item.events), None)
        return 0.0 if first is None else max(0.0, (self.source.now() - first.at).total_seconds())

    def start(self) -> None:
        """Connect to the database, raising what is wrong, and to the broker in the background."""
        for counter in ("backend_events", "backend_failures"):
            self._meter.count(counter, 0, backend=self.name)
        self._meter.gauge("backend_depth", lambda: float(self._depth), backend=self.name)
        self.source.start()
        self._thread.start()

    def pause(self) -> None:
        """Read no further."""
        self.source.pause()

    def stop(self, timeout: float) -> bool:
        """Have what was read acknowledged, for at most ``timeout`` seconds; whether it all was."""
        deadline = time.monotonic() + timeout
        self.pause()
        with self._condition:
            if self._thread.is_alive():
                self._condition.wait_for(lambda: not self._waiting, timeout)
            drained = not self._waiting
            self._ending = True
            self._condition.notify_all()
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        self.source.stop(max(1.0, deadline - time.monotonic()))
        if self._thread.ident is None:
            self._broadcaster.close()
        return drained

    def abandon(self) -> None:
        """In the child of a fork: give up what is inherited."""
        self.source.abandon()

    def submit_page(self, events: Sequence[Event], page: Page) -> None:
        """See DurableSink."""
        with self._condition:
            self._waiting.append(_Item(page, events))
            self._depth += len(events)
            self._condition.notify_all()

    def gap(self, gap: Gap, page: Page | None = None) -> None:
        """See DurableSink."""
        with self._condition:
            self._waiting.append(_Item(page, (), gap))
            self._condition.notify_all()

    def redeliver(self, event: Event, letter: DeadLetter) -> bool:
        """See DurableSink: a broadcaster has no dead letters."""
        return False

    def hears(self, topic: Topic) -> bool:
        """See DurableSink."""
        return True

    def connected(self) -> None:
        """See DurableSink."""

    def disconnected(self, error: BaseException) -> None:
        """See DurableSink."""

    def _run(self) -> None:
        try:
            self._pass_on()
        finally:
            # By this thread: what is closed while it flushes might seem to have arrived.
            try:
                self._broadcaster.close()
            except Exception:
                log.exception("%s could not be closed", self.name)

    def _pass_on(self) -> None:
        while True:
            with self._condition:
                # Once without events, so that a broker which is away shows before there are some.
                self._condition.wait_for(lambda: self._waiting or self._ending or not self._reached)
                if self._ending:
                    return
                self._drop_lost()
                taken = self._take()
            # What another process has taken over is not ours to deliver, nor to count.
            ours = [item for item in taken if item.page is None or item.page.reign.holds()]
            try:
                self._give_up_lost()
                delivered = self._deliver(ours)
                reason = f"no acknowledgement within {FLUSH_SECONDS:g} s"
            # Whatever a broadcaster raises, it is tried again.
            except Exception as error:
                delivered, reason = False, redact(str(error)).strip() or type(error).__name__
            if delivered:
                self._done(taken, ours)
            else:
                self._failed(reason)

    def _drop_lost(self) -> None:
        """Forget what is read again, by this process or another. With the lock held."""
        kept = [item for item in self._waiting if item.page is None or item.page.reign.holds()]
        if len(kept) < len(self._waiting):
            self._waiting = deque(kept)
            self._depth = sum(len(item.events) for item in kept)
            self._condition.notify_all()

    def _give_up_lost(self) -> None:
        """Have the broadcaster forget what another process may be sending.

        When the broker was back, it would come behind what that one has sent meanwhile. While the
        claim is ours, the broadcaster remembers what has arrived: a lease that is over now and
        then, on a machine that is too busy, must not have all of it sent again.
        """
        if self._published and not self.source.is_active:
            self._published = False
            self._broadcaster.close()

    def _take(self) -> list[_Item]:
        """The first pages, which stay in the queue until they are acknowledged."""
        taken: list[_Item] = []
        count = 0
        for item in self._waiting:
            if count >= BATCH:
                break
            taken.append(item)
            count += len(item.events)
        return taken

    def _deliver(self, items: Sequence[_Item]) -> bool:
        for item in items:
            self._published = True
            if item.gap is not None:
                self._broadcaster.announce(item.gap)
            elif item.events:
                self._broadcaster.publish(item.events)
        delivered = self._broadcaster.flush(FLUSH_SECONDS)
        if delivered:
            self._published = False
        return delivered

    def _done(self, taken: Sequence[_Item], ours: Sequence[_Item]) -> None:
        if self._error:
            log.info("%s takes events again", self.name)
        self._error = ""
        self._reached = True
        self._backoff.reset()
        for item in ours:
            if item.page is not None:
                item.page.finish()
        delivered = sum(len(item.events) for item in ours)
        self._delivered += delivered
        self._meter.count("backend_events", delivered, backend=self.name)
        with self._condition:
            for item in taken:
                self._waiting.popleft()
                self._depth -= len(item.events)
            self._condition.notify_all()

    def _failed(self, reason: str) -> None:
        if reason != self._error:
            log.warning("%s does not take events, trying again: %s", self.name, reason)
        self._error = reason
        self._failures += 1
        self._meter.count("backend_failures", backend=self.name)
        with self._condition:
            self._condition.wait_for(lambda: self._ending, self._backoff.next())


def relay_consumers(
    consumer: Consumer, broadcasters: Sequence[Broadcaster], given: Sequence[str] = ()
) -> list[Consumer]:
    """A consumer for each broadcaster, by its given name, or for what it is.

    Its address is no part of that, since it may change.
    """
    found: list[Consumer] = []
    kinds: dict[str, int] = {}
    for index, broadcaster in enumerate(broadcasters):
        kind = re.split(r"[^a-z0-9+-]", str(broadcaster).lower(), maxsplit=1)[0] or "backend"
        number = kinds[kind] = kinds.get(kind, 0) + 1
        suffix = given[index] if given else kind if number == 1 else f"{kind}-{number}"
        name = None if consumer.name is None else f"{consumer.name}/{suffix}"
        found.append(replace(consumer, name=name, parts=1))
    return found
