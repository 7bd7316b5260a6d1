"""Moves events that single receivers have yet to take to the database, and back."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from ..core.errors import PayloadError
from ..core.events import Event, Gap, Message
from ..core.logging import log
from ..core.payload import Decoder
from ..dispatch.held_events import Account, Held, Ledger
from ..dispatch.in_flight import Page
from .acks import Partition
from .claims import Claims
from .consumer_store import ConsumerStore
from .parking_store import Late, Parked, ParkingStore, kept_as

# The most events saved in one transaction, for which other acknowledgements wait.
AT_ONCE = 2000
# How often the ledger is asked what to park.
EVERY_SECONDS = 0.05


class Feed(Protocol):
    """Delivers parked events to the receiver that they were parked for, and to no other."""

    def __call__(self, receiver: Any, events: Sequence[tuple[Event, Held]]) -> bool:
        """Take events for a receiver; return whether there was room for them."""


class Parking:
    """Parks the events that the ledger names, and feeds them to receivers that have room again.

    The thread with the session does all of this; the workers share the ledger with it.
    """

    def __init__(
        self,
        ledger: Ledger,
        feed: Feed,
        moving: Callable[[], bool],
        tell: Callable[[Gap, Callable[[], None]], None],
    ) -> None:
        self.ledger = ledger
        self._feed = feed
        self._moving = moving
        self._tell = tell
        self._store: ParkingStore
        # By partition, the last parked row that a former holder may have tried to deliver.
        self._former: dict[int, int] = {}
        self._leases: dict[int, Any] = {}
        self._looked_at = 0.0
        # Events that are taken, whose rows are yet to be removed.
        self._taken: list[Held] = []
        self._unreadable: set[str] = set()
        self._telling: set[tuple[int, str]] = set()
        self._told: SimpleQueue[tuple[int, str, Any]] = SimpleQueue()

    def open(
        self,
        claims: Claims,
        consumer: ConsumerStore,
        channel_of: Callable[[Event], int],
        decoders: Callable[[], Mapping[int, Decoder]],
    ) -> None:
        """Use another session, without claims yet. ``decoders`` gives each channel's decoder."""
        self._claims, self._store = claims, ParkingStore(consumer)
        self._channel_of, self._decoders = channel_of, decoders
        self._leases.clear()
        self._former.clear()
        # The channels known in this session may make them readable.
        self._unreadable.clear()
        self._telling.clear()
        self.ledger.forget_former()

    def begun(self, part: Partition) -> None:
        """Expect the parked events of a partition whose reading begins, since they come first."""
        number = part.claim.part
        self.ledger.forget_former()
        self._leases[number] = part.lease
        if (after := part.reader.replayed_after) is not None:
            self._store.forget_replayed(number, after)
        found = self._store.receivers(number)
        self._former[number] = max(found.values(), default=0)
        self.ledger.expect(found)

    def described(self) -> None:
        """Try the events again that could not be read, since new channels have become known."""
        if self._unreadable:
            self._unreadable.clear()
            for part in self._claims.parts:
                self.ledger.expect(self._store.receivers(part))

    def turn(self, feeding: bool) -> bool:
        """Park what is due and, if ``feeding``, feed receivers with room; return whether it did.

        True also if reading was blocked by parked events, and is not any more.
        """
        if not (self.ledger.busy or self._taken):
            return False
        blocked = self.ledger.blocks
        leases = {number: part.lease for number, part in self._claims.parts.items()}
        if leases != self._leases:
            self._leases = leases
            self.ledger.forget_former()
        if time.monotonic() - self._looked_at >= EVERY_SECONDS:
            self._looked_at = time.monotonic()
            self.ledger.look()
            self.save()
        self._remove_taken()
        fed = False
        for account in self.ledger.hungry() if feeding else ():
            fed = self._bring_back(account) or fed
        return fed or (blocked and not self.ledger.blocks)

    def save(self) -> None:
        """Park what is due, and all else that holds its pages and those before them.

        Pages are acknowledged in their order, so that one held in front would hold all behind it.
        """
        due = self.ledger.due()
        if not due:
            return
        holding = self.ledger.unsaved()
        for part in list(self._claims.parts.values()):
            pages = list(part.pages)
            last = max((n for n, page in enumerate(pages, 1) if id(page) in due), default=0)
            done, late = 0, list[Held]()
            for page in pages[:last]:
                found = holding.get(id(page), [])
                if not page.held_by(len(found)) or part.lease.over:
                    break
                done += 1
                late += found
                if len(late) >= AT_ONCE:
                    self._save(part, done, late)
                    done, late = 0, []
            if done:
                self._save(part, done, late)

    def leave(self) -> None:
        """Park what is due by now, and remove what has been taken, before the session ends."""
        self.save()
        self._remove_taken()

    def _save(self, part: Partition, pages: int, late: Sequence[Held]) -> None:
        late = [held for held in late if self.ledger.save(held)]
        rows = [
            Late(
                *kept_as(held.event, held.account.label, self._channel_of(held.event)),
                redelivered=bool(held.event._message.redelivered),
            )
            for held in late
        ]
        self._claims.park(part, pages, rows)
        self.ledger.saved(late)

    def _remove_taken(self) -> None:
        self._taken += self.ledger.gone()
        if self._taken:
            self._store.remove(
                [held.account.label for held in self._taken],
                [held.event.uid for held in self._taken],
            )
            self._taken = []

    def _bring_back(self, account: Account) -> bool:
        room = self.ledger.most - len(account.held)
        rows = self._store.fetch(account.label, list(self._claims.parts), account.fed, room)
        # In this order: an event that a worker takes in between is in one set or in the other.
        known = self.ledger.uids(account)
        self._taken += self.ledger.gone()
        known |= {h.event.uid for h in self._taken if h.account is account} | self._unreadable
        found: list[Event] = []
        fed, decoders = account.fed, self._decoders()
        for row in rows:
            event = None if row.uid in known else self._event(row, decoders)
            if event is not None:
                # An update that changes a key concerns the workers of both keys: it goes alone.
                if event._message.moved and (found or account.held):
                    break
                found.append(event)
            fed = row.key
            if event is not None and event._message.moved:
                break
        if not rows and not self._moving():
            self.ledger.catch_up(account, self._feed)
        if found and not self.ledger.feed(account, found, self._feed):
            return False
        further, account.fed = fed > account.fed, fed
        return further

    def _event(self, row: Parked, decoders: Mapping[int, Decoder]) -> Event | None:
        message = None
        try:
            message = decoders[row.channel].decode(row.payload)
        except (KeyError, PayloadError) as error:
            log.error(
                "parked event %d cannot be read any more, and stays parked until its channel is "
                "described again: %s",
                row.key,
                error,
            )
        if not isinstance(message, Message):
            self._unreadable.add(row.uid)
            return None
        part = self._claims.parts[row.part]
        message.page = Page(part.lease, 1)
        message.redelivered = row.redelivered or row.key <= self._former.get(row.part, 0)
        if message.row_payload(0) is None:
            message.position = str(message.sequence)
        return Event(message, row.number, message.rows[0])

    def tell_of_losses(self) -> None:
        """Announce parked events that were dropped, since they had been parked for too long."""
        try:
            while True:
                part, receiver, until = self._told.get_nowait()
                self._store.told(part, receiver, until)
                self._telling.discard((part, receiver))
        except Empty:
            pass
        for part, receiver, since, until in self._store.losses(list(self._claims.parts)):
            if (part, receiver) not in self._telling:
                self._telling.add((part, receiver))
                detail = (
                    f"events that were parked for the receiver {receiver} were dropped before it "
                    "took them: it was too slow for too long"
                )
                log.error("%s", detail)
                gap = Gap(since, until, "retention", detail)
                self._tell(gap, functools.partial(self._told.put, (part, receiver, until)))
