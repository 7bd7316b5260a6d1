"""Signs the tokens with which readers come back, so that nobody can make one up."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable

# Servers refuse headers that are much longer. A reader whose token would be longer gets NOWHERE,
# from which nobody can go on.
LONGEST = 4096
NOWHERE = "-"
_SIGNATURE = 10


class Signer:
    """Signs data with a key of the database's, for one history of it: its ``epoch``."""

    def __init__(self, key: str, epoch: str) -> None:
        self._key = key.encode()
        self._epoch = epoch.encode()

    def seal(self, data: bytes, beside: bytes = b"") -> str:
        """Return the token of the data, which holds for who knows what is ``beside`` it."""
        signed = data + self._signature(data, beside)
        text = base64.urlsafe_b64encode(signed).rstrip(b"=").decode()
        return text if len(text) <= LONGEST else NOWHERE

    def open(self, token: str, beside: Callable[[bytes], bytes] = lambda data: b"") -> bytes | None:
        """Return the data of a token; None for a text that is no token of this history.

        Decode nothing before this has checked the signature: anybody may have sent it.
        """
        if not token.isascii() or len(token) > LONGEST:
            return None
        try:
            data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        data, signature = data[:-_SIGNATURE], data[-_SIGNATURE:]
        if not hmac.compare_digest(signature, self._signature(data, beside(data))):
            return None
        return data

    def _signature(self, data: bytes, beside: bytes) -> bytes:
        message = len(self._epoch).to_bytes(2, "big") + self._epoch + data + beside
        return hmac.new(self._key, message, hashlib.sha256).digest()[:_SIGNATURE]
