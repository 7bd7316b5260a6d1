"""Resume tokens: a reader without a cursor gets one, and goes on in the outbox where it was made.

A token holds the snapshots of a window and the point reached in it, as a cursor does (``cursors``
says why): a transaction that commits late has lower ids than what was read long before. Tokens
come back from browsers, so they are signed, with a key of the database that each process knows.
The signature covers the database's history, and a token of another history is refused. A crash of
the server begins another history: the server may give the numbers of transactions that a snapshot
saw ended, and that were not written down yet, to other transactions.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any

import msgspec

from .cursors import Snapshot

# The number of all events of a message.
ALL = (1 << 31) - 1
# Servers take no headers that are much longer. With so many transactions under way that a token
# would be longer, the one of NOWHERE is given, from which nobody can go on.
LONGEST = 4096
NOWHERE = "-"
_SIGNATURE = 10

_Txid = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
# The differences between its numbers, since small numbers take one byte.
_Packed = tuple[_Txid, _Count, Annotated[tuple[_Count, ...], msgspec.Meta(max_length=LONGEST)]]
_Between = tuple[_Packed, _Count, _Count, _Count]
_Within = tuple[_Packed, _Count, _Count, _Count, _Packed, _Count, _Count]
# The first byte says whether a point is between two windows or within one, whatever the types say:
# so no token of one form passes for one of the other.
_BETWEEN, _WITHIN = b"b", b"w"
_DECODERS: dict[bytes, msgspec.msgpack.Decoder[Any]] = {
    _BETWEEN: msgspec.msgpack.Decoder(_Between),
    _WITHIN: msgspec.msgpack.Decoder(_Within),
}


@dataclass(frozen=True)
class Emptied:
    """The part of the outbox that is gone: rows up to an id that the snapshot sees."""

    id: int
    snapshot: Snapshot


@dataclass(frozen=True)
class ResumePoint:
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
        """The end of the window: nothing beyond it is known."""
        return self.target or self.since

    def at(self, last_id: int, number: int) -> ResumePoint:
        """A later point in the same window."""
        return ResumePoint(
            self.since, self.floor, self.high, self.shed, self.target, last_id, number
        )

    def towards(self, target: Snapshot) -> ResumePoint:
        """The beginning of the window from here to a later snapshot."""
        assert self.target is None
        return ResumePoint(self.since, self.floor, self.high, self.shed, target)

    def turned(self) -> ResumePoint:
        """The end of the window."""
        return ResumePoint(self.reached, self.floor, self.high, self.shed)

    def lacks(self, gone: Emptied) -> bool:
        """Whether what is gone may hold something that is not known here."""
        return gone.id > self.high or (gone.id > self.floor and self._ended(gone))

    def _ended(self, gone: Emptied) -> bool:
        """Whether a transaction that was under way may have left rows in what is gone."""
        return any(gone.snapshot.sees(txid) for txid in self.since.running)


class TokenCodec:
    """Makes tokens of points, and points of tokens, for one history of a database.

    A point within a window says how far a reader has come with the rows of its ``triggers``. With
    those of another version of the application, whose rows have other ids, it means nothing.
    """

    def __init__(self, key: str, epoch: str, triggers: str = "") -> None:
        self.epoch = epoch
        self.triggers = triggers
        self._key = key.encode()

    def encode(self, point: ResumePoint) -> str:
        """The token of a point."""
        data = _pack(point)
        text = base64.urlsafe_b64encode(data + self._signature(data)).rstrip(b"=").decode()
        return text if len(text) <= LONGEST else NOWHERE

    def decode(self, token: str) -> ResumePoint | None:
        """The point of a token; None for a text that is no token of this history."""
        if not token.isascii() or len(token) > LONGEST:
            return None
        try:
            data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        data, signature = data[:-_SIGNATURE], data[-_SIGNATURE:]
        # Nothing is read of what has not been signed here.
        if not hmac.compare_digest(signature, self._signature(data)):
            return None
        try:
            return _unpack(*_DECODERS[data[:1]].decode(data[1:]))
        except (KeyError, ValueError, msgspec.DecodeError):
            return None

    def _signature(self, data: bytes) -> bytes:
        epoch = self.epoch.encode()
        message = len(epoch).to_bytes(2, "big") + epoch + data
        if data[:1] == _WITHIN:
            message += self.triggers.encode()
        return hmac.new(self._key, message, hashlib.sha256).digest()[:_SIGNATURE]


def _pack(point: ResumePoint) -> bytes:
    found = _pack_snapshot(point.since), point.floor, point.high - point.floor, point.shed
    if point.target is None:
        return _BETWEEN + msgspec.msgpack.encode(found)
    within = _pack_snapshot(point.target), point.last_id, point.number
    return _WITHIN + msgspec.msgpack.encode((*found, *within))


def _unpack(since: _Packed, floor: int, above: int, shed: int, *within: Any) -> ResumePoint:
    """The point. Raises ValueError for a snapshot that cannot be."""
    point = ResumePoint(_unpack_snapshot(*since), floor, floor + above, shed)
    if within:
        target, last_id, number = within
        point = point.towards(_unpack_snapshot(*target)).at(last_id, number)
    return point


def _pack_snapshot(snapshot: Snapshot) -> _Packed:
    xmin, running = snapshot.xmin, sorted(snapshot.running)
    steps = tuple(after - before for before, after in pairwise((xmin, *running)))
    return xmin, snapshot.xmax - xmin, steps


def _unpack_snapshot(xmin: int, width: int, steps: tuple[int, ...]) -> Snapshot:
    _, *running = accumulate(steps, initial=xmin)
    if running and running[-1] >= xmin + width:
        raise ValueError(f"transaction {running[-1]} runs, and has not begun")
    return Snapshot(xmin, xmin + width, tuple(running))
