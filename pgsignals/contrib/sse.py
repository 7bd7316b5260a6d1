"""Server-sent events for any web framework: the feed of a Hub that keeps no history."""

from __future__ import annotations

import re
import secrets
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from ..core.events import Event, Gap, model_identity, model_name
from ..dispatch.registry import Subscription
from ..hub.hub import Hub
from .ring import Entry, RingClient, RingFeed, wake_all, wanted_of


class _Position(NamedTuple):
    """The position before the entry of a number, in one process."""

    token: str
    number: int

    @property
    def id(self) -> str:
        return f"{self.token}.{self.number}"


class Client(RingClient):
    """One browser's position in a :class:`Feed`."""

    _feed: Feed

    def _overtaken(self, start: int, frames: list[bytes]) -> bool:
        self._known = self._feed._at(start)
        self._tell_gap("slow", frames)
        return True


class Feed(RingFeed[Client]):
    """The latest events of some targets of a Hub, for any number of clients.

    Each of ``targets`` is a model, a table's name, a label or a watcher, or a tuple of one and
    operations. The last ``size`` events and gaps are kept, and that is how far a client may be
    behind, or may have been away, without missing anything.

    ``ordered`` says that the Hub has one worker, so that all processes see the same order: then an
    id given by one process can be resumed in another. Otherwise an id is good in its own process.

    The feed ends with the Hub's run, and in the child of a fork: ``closed`` is true, its clients
    end, and a new feed is needed. Raises ReceiverError if no watcher delivers a target.
    """

    _client = Client

    def __init__(self, hub: Hub, *targets: Any, size: int = 1000, ordered: bool = True) -> None:
        wanted = wanted_of(targets, size)
        super().__init__(hub, size)
        self._ordered = ordered
        self._token = secrets.token_hex(4)
        self._after_gap = 0
        self._numbers: dict[str, int] = {}
        self._subscriptions: list[Subscription] = []
        try:
            for target, ops in wanted:
                name = f"feed of {model_name(target)}"
                self._subscriptions.append(
                    hub._registry.subscribe(self.put, target, ops, {}, name, collects=True)
                )
        except BaseException:
            self._detach()
            raise
        hub.gap.connect(self._missed)
        hub._callbacks.streams.add(self)

    def put(self, item: Event | Gap) -> None:
        """Append an event or a gap; called by workers."""
        with self._lock:
            if self.closed:
                return
            key = item.uid if isinstance(item, Event) and self._ordered else None
            number = self._ring.next
            if isinstance(item, Gap):
                self._after_gap = number
            if key is not None and (known := self._numbers.get(key)) is not None:
                if known >= self._after_gap:
                    return  # Two targets gave the event, or an outbox gave it again.
                # A database that was restored gives the uids of lost events to other ones.
                key = None
            turned_out = self._ring.put(Entry(item, self._at(number + 1), key or ""))
            if turned_out is not None:
                self._numbers.pop(turned_out.id, None)
            if key is not None:
                self._numbers[key] = number
            sleeping = self._take_sleeping()
        wake_all(sleeping)

    def forked(self) -> None:
        super().forked()
        self._detach()

    def _missed(self, hub: Hub, gap: Gap) -> None:
        self.put(gap)

    def _detach(self) -> None:
        self._hub.gap.disconnect(self._missed)
        for subscription in self._subscriptions:
            subscription.cancel()

    def _at(self, number: int) -> _Position:
        return _Position(self._token, number)

    def _end(self) -> _Position:
        return self._at(self._ring.next)

    def _find(self, last_id: str) -> tuple[_Position, int] | None:
        if (known := self._numbers.get(last_id)) is not None:
            return self._at(known + 1), known + 1
        token, _, digits = last_id.partition(".")
        if token != self._token or not re.fullmatch("[0-9]{1,18}", digits):
            return None
        number = int(digits)
        # The ring itself knows of no number that is yet to come.
        if not self._ring.oldest <= number <= self._ring.next:
            return None
        return self._at(number), number


def feed_key(targets: Iterable[Any]) -> Hashable:
    """Return a key that feeds of the same events, which share one, have in common.

    Raises what Feed raises.
    """
    return tuple((model_identity(target), *ops) for target, ops in wanted_of(targets))
