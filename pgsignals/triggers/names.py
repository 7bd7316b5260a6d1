"""Names and lock keys of database objects: short hashes of all that defines the object."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

PREFIX = "pgsignals_"
LOCK_CLASS = 0x70677367  # "pgsg", so that our advisory locks can be told from others'
INSTALL_LOCK = 0
# Held exclusively by the consumer that is awake.
AWAKE_LOCK = 1
# Held in shared mode by every consumer that lives.
ALIVE_LOCK = 2
HOUSEKEEPING_LOCK = 3
# Held exclusively while triggers are removed; a source waits for it before it relies on triggers.
REMOVAL_LOCK = 4
# Held by the session that reads a partition of a consumer.
CURSOR_CLASS = LOCK_CLASS + 1
# Held by the session of each process that shares a consumer's partitions with others.
MEMBER_CLASS = LOCK_CLASS + 3
# Held in shared mode by each listener; the keys say which triggers it needs, see ``listener_keys``.
LISTENER_CLASS = LOCK_CLASS + 2
LISTENER_LOCKS = 32
LISTENER_BITS = 27
_BITS_EACH = 2
_NAME_BYTES = 63
# The digits that end the name of a replication slot.
_SLOT_DIGITS = 8

INSTALL_LOCKING = f"SELECT pg_catalog.pg_advisory_xact_lock({LOCK_CLASS}, {INSTALL_LOCK})"

# The channel on which consumers are woken, and told of requests.
WAKE_CHANNEL = "pgsignals_wake"
# The prefix of our messages in the write-ahead log.
MESSAGE_PREFIX = "pgsignals"
# The publication of tables with all their changes, and that of those without updates and deletes.
PUBLICATION = "pgsignals"
INSERTS_PUBLICATION = "pgsignals_inserts"

# From QUEUE_SHARE of the server's notification queue on, triggers do not notify: when the queue is
# full, every COMMIT that notifies fails. Up to QUEUE_LIMIT they still send the short notice that
# something is missing.
QUEUE_SHARE = 0.5
QUEUE_LIMIT = 0.9


def wake_statement(payload: str) -> str:
    """Return SQL that notifies all consumers, unless that could fail: they poll by themselves."""
    return (
        f"SELECT pg_catalog.pg_notify('{WAKE_CHANNEL}', '{payload}')"
        f" WHERE pg_catalog.pg_notification_queue_usage() < {QUEUE_LIMIT}"
    )


def digest(*parts: str) -> str:
    """Return 16 hexadecimal digits that stand for ``parts`` and their order."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hasher.update(b"%d:" % len(data))
        hasher.update(data)
    return hasher.hexdigest()[:16]


def object_name(hashed: str) -> str:
    """Return the name of a trigger, of its function and of its channel."""
    return PREFIX + hashed


def _marks(hashed: str) -> int:
    """Return the bits of a trigger in the Bloom filter of a listener's triggers."""
    size = LISTENER_LOCKS * LISTENER_BITS
    number, found = int(hashed, 16), 0
    for _ in range(_BITS_EACH):
        number, bit = divmod(number, size)
        found |= 1 << bit
    return found


def _parts(marks: int) -> list[tuple[int, int]]:
    """Cut the filter's bits into numbered parts that each fit a key; leave out empty parts."""
    cut = (
        (number, marks >> (number * LISTENER_BITS) & (1 << LISTENER_BITS) - 1)
        for number in range(LISTENER_LOCKS)
    )
    return [(number, part) for number, part in cut if part]


def listener_keys(hashes: Iterable[str]) -> list[int]:
    """Return the keys, signed 32-bit numbers, of the locks that show which triggers a listener has.

    They are a Bloom filter of the triggers, cut into at most LISTENER_LOCKS keys: a lock for each
    trigger could fill the server's lock table. The filter may show a trigger too many, which then
    stays until the process has ended, but never one too few.
    """
    marks = 0
    for hashed in hashes:
        marks |= _marks(hashed)
    keys = [number << LISTENER_BITS | part for number, part in _parts(marks)]
    return [key - (1 << 32) if key >= 1 << 31 else key for key in keys]


def listener_parts(hashed: str) -> list[tuple[int, int]]:
    """Return the parts, with their bits, that the keys of every listener to a trigger have."""
    return _parts(_marks(hashed))


def listens(keys: Iterable[int], hashed: str) -> bool:
    """Whether the holder of locks with these keys, which may be unsigned, listens to a trigger."""
    return marked(marks_of(keys), hashed)


def marks_of(keys: Iterable[int]) -> int:
    """Return the filter that is cut into these keys, for ``marked``."""
    marks = 0
    for key in keys:
        number, part = divmod(key & 0xFFFFFFFF, 1 << LISTENER_BITS)
        marks |= part << (number * LISTENER_BITS)
    return marks


def marked(marks: int, hashed: str) -> bool:
    """Whether a trigger is in the filter."""
    wanted = _marks(hashed)
    return marks & wanted == wanted


def channel_key(hashed: str) -> int:
    """Return a channel's number in the outbox: its whole hash, as a signed 64-bit number."""
    key = int(hashed, 16)
    return key - (1 << 64) if key >= 1 << 63 else key


def hash_of(channel: int) -> str:
    """Return the hash whose ``channel_key`` this is."""
    return f"{channel & (1 << 64) - 1:016x}"


def cursor_key(consumer: str, part: int) -> int:
    """Return the number from which the keys of a partition's advisory locks count."""
    return int(digest(consumer, str(part))[:7], 16)


def member_key(consumer: str, holder: str) -> int:
    """Return the key of the advisory lock of a process that shares a consumer's partitions."""
    return int(digest(consumer, holder)[:7], 16)


# No consumer has this name, since PostgreSQL has no text with it.
_STREAMS = "\0streams"


def streams_slot(database: str) -> str:
    """Return the name of the slot that keeps the log for streams to browsers."""
    return slot_name(database, _STREAMS)


def slot_name(database: str, consumer: str) -> str:
    """Return the name of a consumer's slot; slots of all databases of a server share their names.

    It has what is left of the consumer's name, to be recognised by, and a digest of both names.
    """
    hasher = hashlib.sha256(f"{database}\0{consumer}".encode("utf-8", "surrogatepass"))
    end = f"_{hasher.hexdigest()[:_SLOT_DIGITS]}"
    begin = PREFIX + re.sub("[^a-z0-9]+", "_", consumer.lower()).strip("_")
    return begin[: _NAME_BYTES - len(end)] + end
