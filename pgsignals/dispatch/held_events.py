"""The events that receivers have yet to take, where events are acknowledged: in memory, or parked.

An event is acknowledged with its page, once all receivers have taken it. A late receiver holds the
page. If it is late for long, or with many events, the event is parked instead: kept in the database
for this receiver alone, so that the page can be acknowledged.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..core.events import Event
from .batches import Batcher
from .queues import receiver_key
from .registry import Registry, Subscription, receiver_name

# An event that holds its page for so long is parked.
PATIENCE_SECONDS = 10.0


class Held:
    """An event that one receiver has yet to take; it holds its ``page``, unless it is parked.

    ``uses`` counts the calls that have yet to release it; it is ``taken`` when all have.
    """

    __slots__ = ("account", "event", "order", "page", "saving", "since", "taken", "uses")

    def __init__(self, account: Account, event: Event, order: int, parked: bool = False) -> None:
        self.account = account
        self.event = event
        self.page = None if parked else event._message.page
        self.order = order
        self.uses = 1
        self.saving = self.taken = False
        self.since = time.monotonic()

    def release(self) -> None:
        """Note that the receiver has taken the event, or that it is kept as a dead letter."""
        self.account.ledger.release(self)

    @property
    def identity(self) -> tuple[int, int]:
        """The key of the event in its account: its message, and its row in that."""
        return id(self.event._message), self.event._number

    @property
    def over(self) -> bool:
        """Whether the lease is over, so that this process may not deliver the event any more."""
        return bool(self.event._message.page.lease.over)


class Account:
    """The events that one receiver has yet to take: ``held`` in memory, or about to be ``parked``.

    ``unsaved`` are the held events that are not in the database, from the oldest on. While
    ``parking``, each new event is parked behind those that are; ``fed`` is the key of the last
    parked row that has been brought back. ``alone``: an update that changes a key has been fed, and
    nothing else is until the receiver has taken it.
    """

    def __init__(self, ledger: Ledger, receiver: Any, label: str) -> None:
        self.ledger = ledger
        self.receiver = receiver
        self.label = label
        self.held: dict[tuple[int, int], Held] = {}
        self.unsaved: dict[tuple[int, int], Held] = {}
        self.parked: dict[int, Held] = {}
        self.parking = False
        self.alone = False
        self.fed = 0
        # A batch is not late while it is being collected.
        collected = receiver.fn if isinstance(receiver, Subscription) else None
        self.patience = PATIENCE_SECONDS
        if isinstance(collected, Batcher):
            self.patience += collected.every

    def begin(self) -> None:
        """Park each event that comes from now on."""
        self.parking = True
        self.fed = 0


# Delivers parked events to a receiver; returns whether there is room for them.
Deliver = Callable[[Any, list[tuple[Event, Held]]], bool]


class Ledger:
    """The accounts of all receivers that are late.

    A receiver that holds more than ``most`` events has every new one parked, provided that other
    receivers go on; otherwise only the source's bound on events in flight limits what it holds.
    Where all calls are made one after the other, ``parks`` is false: what somebody has parked is
    brought back before anything later is read.
    """

    def __init__(self, registry: Registry, most: int, parks: bool = True) -> None:
        self._registry = registry
        self.most = most
        self._parks = parks
        # The registry's arrivals when all receivers were last met.
        self._known = registry.arrivals
        self._lock = threading.RLock()
        self._accounts: dict[Any, Account] = {}
        self._order = 0
        # The accounts that park, by the receiver's key. ``_awaited`` are labels that have parked
        # events, but no receiver yet; ``_met`` are the keys of the receivers that were asked about.
        self._parking: dict[Any, Account] = {}
        self._awaited: set[str] = set()
        self._met: set[Any] = set()
        self._gone: list[Held] = []
        self.wake: Callable[[], object] = lambda: None

    @property
    def parking(self) -> tuple[str, ...]:
        """The names of the receivers for which every new event is parked."""
        with self._lock:
            return tuple(sorted({receiver_name(a.receiver) for a in self._parking.values()}))

    @property
    def blocks(self) -> bool:
        """Whether the source must not read on before the parked events have been brought back."""
        return bool(self._parking) and not self._parks

    @property
    def busy(self) -> bool:
        """Whether anything is held or parked."""
        return bool(self._accounts or self._gone or self._awaited)

    def hold(self, receiver: Any, event: Event) -> Held:
        """Hold an event's page until the receiver has taken it; release once for each call."""
        identity = id(event._message), event._number
        with self._lock:
            account = self._account(receiver)
            found = account.held.get(identity)
            if found is None:
                event._message.page.hold()
                found = account.held[identity] = self._new(account, event)
                account.unsaved[identity] = found
                if len(account.held) == self.most + 1:
                    self.wake()
                return found
            found.uses += 1
            return found

    def _new(self, account: Account, event: Event, parked: bool = False) -> Held:
        self._order += 1
        return Held(account, event, self._order, parked)

    def _account(self, receiver: Any) -> Account:
        key = receiver_key(receiver)
        if (found := self._accounts.get(key)) is None:
            taken = {each.label for each in self._accounts.values()}
            label = first = self._registry.label(receiver)
            number = 2
            while label in taken:
                label, number = f"{first.partition('#')[0]}#{number}", number + 1
            found = self._accounts[key] = Account(self, receiver, label)
        return found

    def release(self, held: Held) -> None:
        """See Held."""
        account, page = held.account, None
        with self._lock:
            held.uses -= 1
            if held.uses:
                return
            account.held.pop(held.identity, None)
            account.unsaved.pop(held.identity, None)
            held.taken = True
            # Of an event that is being saved, ``saved`` takes care.
            if not held.saving:
                page, held.page = held.page, None
                if page is None:
                    self._gone.append(held)
                    if len(self._gone) == 1:
                        self.wake()
            left = len(account.held)
            if account.parking and left in (0, self.most // 2):
                self.wake()
            self._tidy(account)
        if page is not None:
            page.release()

    def _tidy(self, account: Account) -> None:
        key = receiver_key(account.receiver)
        empty = not (account.held or account.parked or account.parking)
        # Only the present account: a call that outlasts its lease releases in a former one.
        if empty and self._accounts.get(key) is account:
            del self._accounts[key]

    def park(self, receiver: Any, event: Event) -> bool:
        """Park an event if the receiver's events are parked; return whether they are."""
        if not (self._parking or self._awaited):
            return False
        key = receiver_key(receiver)
        page = event._message.page
        with self._lock:
            if key not in self._parking and key not in self._met:
                self._meet(receiver)
            if (account := self._parking.get(key)) is None:
                return False
            held = self._new(account, event)
            held.uses = 0
            page.hold()
            account.parked[held.order] = held
            if len(account.parked) == 1:
                self.wake()
            return True

    def expect(self, labels: Iterable[str]) -> None:
        """Park what comes for the receivers of these labels, since events are parked for them."""
        with self._lock:
            self._awaited |= set(labels)
            self._met.clear()
            for account in self._accounts.values():
                self._found(account)
            self._meet_all()

    def _meet_all(self) -> None:
        self._known = self._registry.arrivals
        for receiver in self._registry.everybody() if self._awaited else ():
            if receiver_key(receiver) not in self._met:
                self._meet(receiver)

    def _meet(self, receiver: Any) -> None:
        """Begin to park for a receiver if events are parked under its label."""
        if not self._awaited:
            return
        self._met.add(receiver_key(receiver))
        if not _is_fleeting(receiver) and self._registry.label(receiver) in self._awaited:
            self._found(self._account(receiver))

    def _found(self, account: Account) -> None:
        if account.label in self._awaited:
            self._awaited.discard(account.label)
            account.begin()
            self._parking[receiver_key(account.receiver)] = account

    # The thread that parks calls the methods below.

    def look(self) -> None:
        """Begin to park for receivers that hold too much, provided that others go on.

        Receivers that have come meanwhile get what is parked for them, even if no event comes.
        """
        if not self._parks:
            return
        with self._lock:
            if self._awaited and self._known != self._registry.arrivals:
                self._meet_all()
            full = [each for each in self._accounts.values() if len(each.held) > self.most]
            for account in full:
                if not account.parking and self._others_go_on(account):
                    account.begin()
                    self._parking[receiver_key(account.receiver)] = account

    def _others_go_on(self, late: Account) -> bool:
        """Whether another receiver has taken, or never got, the event that ``late`` held first.

        A receiver that still holds that event may hang, too, and its account fill a moment later.
        """
        if self._registry.observers:
            return True
        oldest = next(iter(late.held))
        for receiver in self._registry.everybody():
            account = self._accounts.get(receiver_key(receiver))
            if account is None or not (
                account.parking or oldest in account.held or len(account.held) > self.most
            ):
                return True
        return False

    def due(self) -> set[int]:
        """Return the ids of the pages that are held by events to be parked."""
        now = time.monotonic()
        found: set[int] = set()
        with self._lock:
            for account in self._accounts.values():
                found.update(id(held.page) for held in account.parked.values())
                for held in account.unsaved.values():
                    patient = not self._parks or now - held.since <= account.patience
                    if patient and not account.parking:
                        break
                    found.add(id(held.page))
        return found

    def unsaved(self) -> dict[int, list[Held]]:
        """Return the events that hold pages, by the page's id, in the order in which they came."""
        found: list[Held] = []
        with self._lock:
            for account in self._accounts.values():
                found += account.parked.values()
                found += account.unsaved.values()
        pages: dict[int, list[Held]] = {}
        for held in sorted(found, key=lambda held: held.order):
            pages.setdefault(id(held.page), []).append(held)
        return pages

    def save(self, held: Held) -> bool:
        """Begin to park an event; False if the receiver has taken it meanwhile."""
        with self._lock:
            if held.taken:
                return False
            held.saving = True
            account = held.account
            if account.unsaved.pop(held.identity, None) is None:
                del account.parked[held.order]
            return True

    def saved(self, late: Sequence[Held]) -> None:
        """Note that these events are parked, and their pages acknowledged."""
        with self._lock:
            for held in late:
                held.saving, held.page = False, None
                if held.taken:
                    self._gone.append(held)
                self._tidy(held.account)

    def gone(self) -> list[Held]:
        """Return the parked events that have been taken since the last call."""
        with self._lock:
            found, self._gone = self._gone, []
            return found

    def uids(self, account: Account) -> set[str]:
        """Return the uids of the parked events that are in memory."""
        with self._lock:
            return {held.event.uid for held in account.held.values() if held.page is None}

    def hungry(self) -> list[Account]:
        """Return the accounts that park, and have room in memory for parked events."""
        with self._lock:
            return [
                each
                for each in self._parking.values()
                if len(each.held) <= self.most // 2 and not (each.alone and each.held)
            ]

    def feed(self, account: Account, events: Sequence[Event], deliver: Deliver) -> bool:
        """Deliver parked events; return whether ``deliver`` took them."""
        with self._lock:
            found = [(event, self._new(account, event, parked=True)) for event in events]
            for _, held in found:
                account.held[held.identity] = held
            account.alone = any(event._message.moved for event, _ in found)
            done = deliver(account.receiver, found)
            if not done:
                for _, held in found:
                    del account.held[held.identity]
                account.alone = False
            return done

    def catch_up(self, account: Account, deliver: Deliver) -> bool:
        """Deliver the events yet to be parked, all parked ones having been fed, and end parking.

        Return False, with nothing changed, if there is no room for them.
        """
        with self._lock:
            late = list(account.parked.values())
            if (
                len(account.held) + len(late) > self.most
                or (account.alone and account.held)
                or any(held.event._message.moved for held in late)
            ):
                return False
            if late and not deliver(account.receiver, [(held.event, held) for held in late]):
                return False
            for held in late:
                held.uses = 1
                account.held[held.identity] = account.unsaved[held.identity] = held
            account.parked = {}
            account.parking = account.alone = False
            del self._parking[receiver_key(account.receiver)]
            self._tidy(account)
            return True

    def forget_former(self) -> None:
        """Drop the events whose leases are over, which this process may not deliver any more."""
        with self._lock:
            for account in list(self._accounts.values()):
                account.held = {k: held for k, held in account.held.items() if not held.over}
                account.unsaved = {k: h for k, h in account.unsaved.items() if not h.over}
                account.parked = {k: h for k, h in account.parked.items() if not h.over}
                self._tidy(account)


def _is_fleeting(receiver: Any) -> bool:
    """Whether the receiver only passes events on within this process, and is never late."""
    return (
        type(receiver) is Subscription
        and receiver.collects
        and not isinstance(receiver.fn, Batcher)
    )
