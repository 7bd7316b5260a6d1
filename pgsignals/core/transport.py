"""The transports: the ways of an event from its trigger to the process."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from .errors import ConfigurationError

Delivery = Literal["notify", "outbox", "wal"]
# What serves a watcher in the write-ahead log: the rows themselves, or messages of a trigger.
Capture = Literal["rows", "messages"]


class Transport(Enum):
    """The way of events from a trigger to the process; its value is that of ``start(delivery=…)``.

    ``Transport(delivery)`` raises ConfigurationError for any other value.
    """

    _value_: Delivery

    NOTIFY = "notify"
    OUTBOX = "outbox"
    WAL = "wal"

    @property
    def durable(self) -> bool:
        """Whether events wait for their consumer, and come again until they are acknowledged."""
        return self is not Transport.NOTIFY

    @classmethod
    def _missing_(cls, value: object) -> Transport:
        known = ", ".join(repr(each.value) for each in cls)
        raise ConfigurationError(f"delivery={value!r}: it is one of {known}.")
