"""NKeys and signed credentials for a nats-server of a test, as ``nsc`` would make them."""

from __future__ import annotations

import base64
import json
import os
import time
from typing import Any

import nkeys


class Key:
    """A pair of keys of one kind, by the prefix that nkeys has for it."""

    def __init__(self, prefix: int) -> None:
        self.seed: str = nkeys.encode_seed(os.urandom(32), prefix).decode()
        self.pair = nkeys.from_seed(bytearray(self.seed.encode()))
        self.public: str = self.pair.public_key.decode()


def user_key() -> Key:
    """A user's."""
    return Key(nkeys.PREFIX_BYTE_USER)


class Operator:
    """An operator with the system's account and another one, which may use JetStream."""

    def __init__(self) -> None:
        self._operator = Key(nkeys.PREFIX_BYTE_OPERATOR)
        self._account = Key(nkeys.PREFIX_BYTE_ACCOUNT)
        limits = dict.fromkeys(
            ("subs", "data", "payload", "conn", "leaf", "imports", "exports"), -1
        )
        system = Key(nkeys.PREFIX_BYTE_ACCOUNT)
        of_system = _signed(self._operator, system.public, "account", {"limits": limits})
        limits |= dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
        operator = _signed(self._operator, self._operator.public, "operator", {})
        account = _signed(self._operator, self._account.public, "account", {"limits": limits})
        # For the server's configuration.
        self.configuration = (
            f"operator: {operator}\nresolver: MEMORY\nsystem_account: {system.public}\n"
            f"resolver_preload: {{ {self._account.public}: {account},"
            f" {system.public}: {of_system} }}\n"
        )

    def credentials(self) -> str:
        """A credentials file for a new user."""
        user = user_key()
        unlimited = {"subs": -1, "data": -1, "payload": -1}
        token = _signed(self._account, user.public, "user", unlimited)
        return (
            f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )


def _signed(issuer: Key, subject: str, kind: str, claims: dict[str, Any]) -> str:
    body = {
        "jti": base64.b32encode(os.urandom(20)).decode(),
        "iat": int(time.time()),
        "iss": issuer.public,
        "sub": subject,
        "name": kind,
        "nats": claims | {"type": kind, "version": 2},
    }
    parts = [_encoded(json.dumps(each).encode()) for each in (_HEADER, body)]
    signature = issuer.pair.sign(".".join(parts).encode())
    return ".".join([*parts, _encoded(signature)])


_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
