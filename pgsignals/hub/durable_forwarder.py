"""Forwards the events of durable delivery: a consumer of its own for each broker."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import replace

from ..consumers.claims import Consumer
from ..consumers.dead_letters import DeadLetter
from ..core.events import Event, Topic
from ..core.metrics import Meter
from ..dispatch.backend_status import BackendStatus
from ..dispatch.forwarder import Forwarder
from ..plugins.broadcaster import Broadcaster
from ..sources.durable import DurablePreparer, DurableSource
from .options import Options


class DurableForwarder(Forwarder):
    """A Forwarder with a cursor of its own, which moves as its broadcaster acknowledges.

    It is the sink of a source of its own: it drops nothing, and nobody else waits for it.
    """

    def __init__(
        self,
        broadcaster: Broadcaster,
        options: Options,
        preparer: DurablePreparer,
        consumer: Consumer,
        meter: Meter,
    ) -> None:
        super().__init__(broadcaster, options.queue_size, meter)
        self.source = DurableSource(
            options, preparer, self, meter, consumer, 2 * options.queue_size
        )

    @property
    def failure(self) -> str:
        return super().failure or self.source.failure

    @property
    def status(self) -> BackendStatus:
        return replace(super().status, active=self.source.is_active, lag=self._lag)

    @property
    def _lag(self) -> float:
        """The age, in seconds, of the oldest event that has yet to be acknowledged."""
        with self._condition:
            items = itertools.chain(self._under_way, self._waiting)
            first = next((item.events[0] for item in items if item.events), None)
        return 0.0 if first is None else max(0.0, (self.source.now() - first.at).total_seconds())

    def start(self) -> None:
        """Connect to the database, raising its error, and to the broker in the background."""
        self.source.start()
        super().start()

    def stop(self, timeout: float) -> bool:
        """Send what was read, for at most ``timeout`` seconds; return if all was acknowledged."""
        deadline = time.monotonic() + timeout
        self.source.pause()
        drained = super().stop(timeout)
        self.source.stop(max(1.0, deadline - time.monotonic()))
        return drained

    def abandon(self) -> None:
        super().abandon()
        self.source.abandon()

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

    def _taken_over(self) -> bool:
        """See Forwarder. The broadcaster is closed then, and forgets what it has.

        Otherwise its events would reach a broker that comes back behind those that another process
        has sent meanwhile. While the claim is ours, the broadcaster stays open, and remembers what
        is under way: otherwise all of that would be sent again whenever a lease is over for a while
        on a machine that is too busy.
        """
        return not self.source.is_active


def backend_consumers(
    consumer: Consumer, broadcasters: Sequence[Broadcaster], given: Sequence[str] = ()
) -> list[Consumer]:
    """Return a consumer for each broadcaster, with its given name, or one from its kind.

    The broker's address is no part of the name, since it may change.
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
