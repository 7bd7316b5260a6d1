"""Names of database objects: short, and hashed from all that defines the object."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

PREFIX = "pgsignals_"
LOCK_CLASS = 0x70677367  # "pgsg", so that our advisory locks can be told from others'
INSTALL_LOCK = 0
# Held exclusively by a consumer that is awake, and by each that lives in shared mode.
AWAKE_LOCK = 1
ALIVE_LOCK = 2
HOUSEKEEPING_LOCK = 3
# Held exclusively while triggers are removed, and waited for by whoever is about to need some.
REMOVAL_LOCK = 4
# Held by the session that reads for a part of a consumer.
CURSOR_CLASS = LOCK_CLASS + 1
# Held by the session of each process that shares a consumer's parts with others.
MEMBER_CLASS = LOCK_CLASS + 3
# Held in shared mode by each that listens: their keys say to what, see ``listener_keys``.
LISTENER_CLASS = LOCK_CLASS + 2
LISTENER_LOCKS = 32
LISTENER_BITS = 27
_BITS_EACH = 2

# Consumers of the outbox listen to it.
WAKE_CHANNEL = "pgsignals_wake"

# From this share of the server's notification queue on, nobody of ours notifies: when the queue is
# full, every COMMIT that notifies fails. Below the second share, a word that something is missing
# still goes; it is short.
QUEUE_SHARE = 0.5
QUEUE_LIMIT = 0.9


def wake_statement(payload: str) -> str:
    """SQL that tells all consumers something, unless that could fail: they look by themselves."""
    return (
        f"SELECT pg_catalog.pg_notify('{WAKE_CHANNEL}', '{payload}')"
        f" WHERE pg_catalog.pg_notification_queue_usage() < {QUEUE_LIMIT}"
    )


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


def _marks(hashed: str) -> int:
    """The bits that stand for a trigger in the set of what somebody listens to."""
    size = LISTENER_LOCKS * LISTENER_BITS
    number, found = int(hashed, 16), 0
    for _ in range(_BITS_EACH):
        number, bit = divmod(number, size)
        found |= 1 << bit
    return found


def _parts(marks: int) -> list[tuple[int, int]]:
    """A set's bits, cut into numbered parts that each fit a key; those without a bit left out."""
    cut = (
        (number, marks >> (number * LISTENER_BITS) & (1 << LISTENER_BITS) - 1)
        for number in range(LISTENER_LOCKS)
    )
    return [(number, part) for number, part in cut if part]


def listener_keys(hashes: Iterable[str]) -> list[int]:
    """The keys, signed 32-bit numbers, of the locks by which others see who listens to what.

    A Bloom filter of the triggers, cut into at most LISTENER_LOCKS keys, however many there are: a
    lock for each trigger would fill the server's lock table. It may name a trigger too many, which
    then stays until that process has gone, and never one too few.
    """
    marks = 0
    for hashed in hashes:
        marks |= _marks(hashed)
    keys = [number << LISTENER_BITS | part for number, part in _parts(marks)]
    return [key - (1 << 32) if key >= 1 << 31 else key for key in keys]


def listener_parts(hashed: str) -> list[tuple[int, int]]:
    """The parts, and their bits, that the keys of whoever listens to a trigger have."""
    return _parts(_marks(hashed))


def listens(keys: Iterable[int], hashed: str) -> bool:
    """Whether who holds the locks with these keys, which may be unsigned, listens to a trigger."""
    marks = 0
    for key in keys:
        number, part = divmod(key & 0xFFFFFFFF, 1 << LISTENER_BITS)
        marks |= part << (number * LISTENER_BITS)
    wanted = _marks(hashed)
    return marks & wanted == wanted


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


def member_key(consumer: str, holder: str) -> int:
    """The key of the advisory lock of a process that shares a consumer's parts."""
    return int(digest(consumer, holder)[:7], 16)
