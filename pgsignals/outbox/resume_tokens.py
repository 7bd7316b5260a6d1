"""Resume tokens, with which a reader without a cursor goes on in the outbox where it stopped.

A token holds the snapshots of a window and the point reached in it, as a cursor does (``cursors``
says why): a transaction that commits late has lower ids than rows read long before. Tokens come
back from browsers, so they are signed, with a key of the database that each process knows. The
signature covers the database's history, and a token of another history is refused. A crash of the
server begins another history: the server may give the number of a transaction that a snapshot saw
ended to another transaction, if that number was not written down yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any

import msgspec

from ..consumers.signed_tokens import LONGEST, Signer
from ..postgres.snapshot import Snapshot

# In place of an event's number: all events of the message are known.
ALL = (1 << 31) - 1

_Txid = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
# A snapshot as xmin, xmax - xmin and the steps between running transactions: small numbers take one
# byte.
_Packed = tuple[_Txid, _Count, Annotated[tuple[_Count, ...], msgspec.Meta(max_length=LONGEST)]]
_Between = tuple[_Packed, _Count, _Count, _Count]
_Within = tuple[_Packed, _Count, _Count, _Count, _Packed, _Count, _Count]
# The first byte says whether a point lies between two windows or within one, so that no token of
# one form passes for one of the other.
_BETWEEN, _WITHIN = b"b", b"w"
_DECODERS: dict[bytes, msgspec.msgpack.Decoder[Any]] = {
    _BETWEEN: msgspec.msgpack.Decoder(_Between),
    _WITHIN: msgspec.msgpack.Decoder(_Within),
}


@dataclass(frozen=True)
class Emptied:
    """The part of the outbox that is gone: rows that the snapshot sees, with ids up to ``id``."""

    id: int
    snapshot: Snapshot


@dataclass(frozen=True)
class ResumePoint:
    """A point that a reader has reached in the outbox.

    The reader knows all rows that ``since`` sees; with a ``target``, also those below ``last_id``
    of the window between both, and the events up to ``number`` of the row ``last_id``. Rows that
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
        """The snapshot at the end of the window: the reader knows nothing beyond it."""
        return self.target or self.since

    def at(self, last_id: int, number: int) -> ResumePoint:
        """A later point in the same window."""
        return ResumePoint(
            self.since, self.floor, self.high, self.shed, self.target, last_id, number
        )

    def towards(self, target: Snapshot) -> ResumePoint:
        """The point at the beginning of the window from here to a later snapshot."""
        assert self.target is None
        return ResumePoint(self.since, self.floor, self.high, self.shed, target)

    def turned(self) -> ResumePoint:
        """The point at the end of the window."""
        return ResumePoint(self.reached, self.floor, self.high, self.shed)

    def lacks(self, gone: Emptied) -> bool:
        """Whether ``gone`` may have had rows that the reader does not know."""
        # Those are of transactions from since.xmax on, or of those that ran at ``since``.
        return gone.id > self.high or (gone.id > self.floor and self._ended(gone))

    def _ended(self, gone: Emptied) -> bool:
        """Whether a transaction that ran at ``since`` may have had rows in ``gone``."""
        return any(gone.snapshot.sees(txid) for txid in self.since.running)


class TokenCodec:
    """Turns points into tokens, and tokens into points, for one history of a database.

    A point within a window lies among the rows of the reader's ``triggers``. Another version of the
    application has other triggers, whose rows have other ids, and refuses the token.
    """

    def __init__(self, key: str, epoch: str, triggers: str = "") -> None:
        self.epoch = epoch
        self.triggers = triggers
        self._signer = Signer(key, epoch)

    def encode(self, point: ResumePoint) -> str:
        """Return the token of a point; NOWHERE while very many transactions are under way."""
        data = _pack(point)
        return self._signer.seal(data, self._beside(data))

    def decode(self, token: str) -> ResumePoint | None:
        """Return the point of a token; None for a text that is no token of this history."""
        data = self._signer.open(token, self._beside)
        if data is None:
            return None
        try:
            return _unpack(*_DECODERS[data[:1]].decode(data[1:]))
        except (KeyError, ValueError, msgspec.DecodeError):
            return None

    def _beside(self, data: bytes) -> bytes:
        return self.triggers.encode() if data[:1] == _WITHIN else b""


def _pack(point: ResumePoint) -> bytes:
    found = _pack_snapshot(point.since), point.floor, point.high - point.floor, point.shed
    if point.target is None:
        return _BETWEEN + msgspec.msgpack.encode(found)
    within = _pack_snapshot(point.target), point.last_id, point.number
    return _WITHIN + msgspec.msgpack.encode((*found, *within))


def _unpack(since: _Packed, floor: int, above: int, shed: int, *within: Any) -> ResumePoint:
    """Return the point. Raises ValueError for a snapshot that cannot be."""
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
