"""Where somebody stands in the outbox who keeps no cursor there: as a text that he gives back.

It holds the snapshots of a window and the place in it, for the reasons that ``cursors`` gives: what
commits late has a lower id than what was told long before. The text comes from elsewhere, and is
signed, so that nobody makes one up. The key is the database's, so that each process knows it; the
history that the text is of is signed too, so that it means nothing in another one. A crash of the
server begins another one: it may give numbers again to other transactions that a snapshot, which
nobody had written down, saw ended.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass

from .cursors import Snapshot

# Of a message's events, all.
ALL = (1 << 31) - 1
# Servers take no headers that are much longer. A place among so many transactions that its text
# would be longer has one from which nobody can go on.
LONGEST = 4096
NOWHERE = "-"
_FORM = 1
_SIGNATURE = 10
_MOST_RUNNING = 4096


@dataclass(frozen=True)
class Emptied:
    """What is gone from the outbox: rows up to an id, of transactions that the snapshot sees."""

    id: int
    snapshot: Snapshot


@dataclass(frozen=True)
class Place:
    """All that ``since`` sees is known; with a ``target``, also a part of the window between both.

    That is its rows below ``last_id``, and of that row the events up to ``number``. Rows that
    ``since`` does not see have ids above ``floor``, and those of transactions from its xmax on
    above ``high``. ``shed`` counts the statements that had found the outbox full.
    """

    since: Snapshot
    floor: int
    high: int
    shed: int
    target: Snapshot | None = None
    last_id: int = 0
    number: int = ALL

    @property
    def reached(self) -> Snapshot:
        """Where the window ends: nothing beyond it is known."""
        return self.target or self.since

    def at(self, last_id: int, number: int) -> Place:
        """A later place in the same window."""
        return Place(self.since, self.floor, self.high, self.shed, self.target, last_id, number)

    def towards(self, target: Snapshot) -> Place:
        """The beginning of the window from here to a later snapshot."""
        assert self.target is None
        return Place(self.since, self.floor, self.high, self.shed, target, 0, ALL)

    def turned(self) -> Place:
        """The end of the window."""
        return Place(self.reached, self.floor, self.high, self.shed)

    def lacks(self, gone: Emptied) -> bool:
        """Whether what is gone may hold something that is not known here."""
        return gone.id > self.high or (gone.id > self.floor and self._ended(gone))

    def _ended(self, gone: Emptied) -> bool:
        """Whether a transaction that was under way may have left rows in what is gone."""
        return any(gone.snapshot.sees(txid) for txid in self.since.running)


def covers(later: Snapshot, earlier: Snapshot) -> bool:
    """Whether one snapshot sees all that the other does."""
    return (
        later.xmax >= earlier.xmax
        and later.xmin >= earlier.xmin
        and not any(earlier.sees(txid) for txid in later.running)
    )


class Signer:
    """Makes texts of places, and places of texts, for one history of a database."""

    def __init__(self, key: str, epoch: str) -> None:
        self.epoch = epoch
        self._key = key.encode()

    def sign(self, place: Place) -> str:
        """The text."""
        data = _pack(place)
        text = base64.urlsafe_b64encode(data + self._signature(data)).rstrip(b"=").decode()
        return text if len(text) <= LONGEST else NOWHERE

    def read(self, text: str) -> Place | None:
        """The place; None where this text was not made here."""
        if not text.isascii() or len(text) > LONGEST:
            return None
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        data, signature = data[:-_SIGNATURE], data[-_SIGNATURE:]
        if not hmac.compare_digest(signature, self._signature(data)):
            return None
        try:
            return _unpack(data)
        except (IndexError, ValueError):
            return None

    def _signature(self, data: bytes) -> bytes:
        epoch = self.epoch.encode()
        message = len(epoch).to_bytes(2, "big") + epoch + data
        return hmac.new(self._key, message, hashlib.sha256).digest()[:_SIGNATURE]


def _pack(place: Place) -> bytes:
    found = bytearray([_FORM])

    def put(number: int) -> None:
        while number > 0x7F:
            found.append(0x80 | number & 0x7F)
            number >>= 7
        found.append(number)

    def put_snapshot(snapshot: Snapshot) -> None:
        put(snapshot.xmin)
        put(snapshot.xmax - snapshot.xmin)
        put(len(snapshot.running))
        before = snapshot.xmin
        for txid in sorted(snapshot.running):
            put(txid - before)
            before = txid

    put_snapshot(place.since)
    put(place.floor)
    put(place.high - place.floor)
    put(place.shed)
    if place.target is not None:
        put_snapshot(place.target)
        put(place.last_id)
        put(place.number)
    return bytes(found)


def _unpack(data: bytes) -> Place:
    at = 0

    def take() -> int:
        nonlocal at
        number = shift = 0
        while True:
            byte = data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if number >> 63:
                raise ValueError(number)
            if byte < 0x80:
                return number

    def take_snapshot() -> Snapshot:
        xmin = take()
        xmax = xmin + take()
        count = take()
        if count > _MOST_RUNNING:
            raise ValueError(count)
        running: list[int] = []
        for _ in range(count):
            running.append((running[-1] if running else xmin) + take())
        if xmin == 0 or (running and running[-1] >= xmax):
            raise ValueError(xmin)
        return Snapshot(xmin, xmax, tuple(running))

    if take() != _FORM:
        raise ValueError(data)
    since = take_snapshot()
    floor = take()
    high = floor + take()
    shed = take()
    if at == len(data):
        return Place(since, floor, high, shed)
    place = Place(since, floor, high, shed, take_snapshot(), take(), take())
    if at != len(data):
        raise ValueError(data)
    return place
