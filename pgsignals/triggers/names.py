"""Names of database objects: short, and hashed from all that defines the object."""

from __future__ import annotations

import hashlib

PREFIX = "pgsignals_"
LOCK_CLASS = 0x70677367  # "pgsg", so that our advisory locks can be told from others'
INSTALL_LOCK = 0
# Held exclusively by a consumer that is awake, and by each that lives in shared mode.
AWAKE_LOCK = 1
ALIVE_LOCK = 2
HOUSEKEEPING_LOCK = 3
# Held by the session that reads for a part of a consumer.
CURSOR_CLASS = LOCK_CLASS + 1


def digest(*parts: str) -> str:
    """16 hexadecimal digits that stand for ``parts`` and their order."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hasher.update(b"%d:" % len(data))
        hasher.update(data)
    return hasher.hexdigest()[:16]


def object_name(hashed: str) -> str:
    """The name of a trigger, of its function and of its channel."""
    return PREFIX + hashed


def lock_key(hashed: str) -> int:
    """The key, a signed 32-bit number, of the advisory lock that a listener of it holds."""
    key = int(hashed[:8], 16)
    return key - (1 << 32) if key >= 1 << 31 else key


def channel_key(hashed: str) -> int:
    """What rows of the outbox call a channel: all of its hash, as a signed 64-bit number."""
    key = int(hashed, 16)
    return key - (1 << 64) if key >= 1 << 63 else key


def hash_of(channel: int) -> str:
    """The hash whose ``channel_key`` this is."""
    return f"{channel & (1 << 64) - 1:016x}"


def cursor_key(consumer: str, part: int) -> int:
    """What the keys of the advisory locks of a consumer's part count from."""
    return int(digest(consumer, str(part))[:7], 16)
