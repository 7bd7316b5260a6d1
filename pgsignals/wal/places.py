"""Places in the write-ahead log, and resume tokens with which readers go on from there.

All readers of a log find the same events in the same order: transactions as they committed, their
changes as they were made. So a place is a number or two, whoever reads. LSNs outlive a crash of
the server, since only what is on disk is given to readers.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec

from ..consumers.signed_tokens import Signer

_Number = Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)]


class Place(NamedTuple):
    """A place in the log; places compare as what is there follows one another.

    ``change`` counts the changes of the transaction that committed at ``lsn``, ``row`` the rows of
    a trigger's message, and ``topic`` is the name of the topic whose event is there. Without a
    change it is the place before all that committed at ``lsn`` or behind it.
    """

    lsn: _Number
    change: _Number = -1
    row: _Number = 0
    topic: str = ""


class _Token(NamedTuple):
    shed: _Number
    place: Place


_DECODER = msgspec.msgpack.Decoder(_Token)


class PlaceCodec:
    """Turns places into tokens, and tokens into places, for one history of a database.

    A token also has the count of the messages that writers could not write to the log by then.
    """

    def __init__(self, key: str, epoch: str) -> None:
        self.epoch = epoch
        self._signer = Signer(key, epoch)

    def encode(self, place: Place, shed: int) -> str:
        """Return the token of a place."""
        return self._signer.seal(msgspec.msgpack.encode(_Token(shed, place)))

    def decode(self, token: str) -> tuple[Place, int] | None:
        """Return a token's place and count; None for a text that is no token of this history."""
        data = self._signer.open(token)
        if data is None:
            return None
        try:
            found = _DECODER.decode(data)
        except msgspec.DecodeError:
            return None
        return found.place, found.shed
