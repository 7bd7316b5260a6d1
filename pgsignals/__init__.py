"""PostgreSQL changes as Python signals.

The functions here act on one default Hub; ``Hub()`` makes further ones, for a second database.
"""

from __future__ import annotations

from .backfills import Backfill
from .errors import (
    BrokerError,
    ConfigurationError,
    ConnectError,
    DatabaseError,
    DriftError,
    InstallLockError,
    MissingExtraError,
    ModelError,
    PayloadError,
    PgSignalsError,
    PluginError,
    PrivilegeError,
    ReceiverError,
    StateError,
    TableError,
    WaitTimeout,
    WatcherError,
)
from .events import Batch, Event, Gap
from .hookspecs import hookimpl
from .hub import Hub
from .inspection import Health, Status
from .outbox.once import once
from .receivers import Subscription
from .streams import Stream
from .tables import Column, Resolver, Table, TableRef
from .transaction import context, muted
from .watchers import Watcher, watch

__version__ = "0.1.0"

default_hub = Hub()
"""The Hub that the functions of this module act on."""

start = default_hub.start
stop = default_hub.stop
astop = default_hub.astop
wait = default_hub.wait
run = default_hub.run
status = default_hub.status
health = default_hub.health
on = default_hub.on
on_batch = default_hub.on_batch
on_gap = default_hub.on_gap
subscribe = default_hub.subscribe
signal = default_hub.signal
stream = default_hub.stream
wait_for = default_hub.wait_for
backfill = default_hub.backfill
connected = default_hub.connected
disconnected = default_hub.disconnected
gap = default_hub.gap
receiver_failed = default_hub.receiver_failed

__all__ = [
    "Backfill",
    "Batch",
    "BrokerError",
    "Column",
    "ConfigurationError",
    "ConnectError",
    "DatabaseError",
    "DriftError",
    "Event",
    "Gap",
    "Health",
    "Hub",
    "InstallLockError",
    "MissingExtraError",
    "ModelError",
    "PayloadError",
    "PgSignalsError",
    "PluginError",
    "PrivilegeError",
    "ReceiverError",
    "Resolver",
    "StateError",
    "Status",
    "Stream",
    "Subscription",
    "Table",
    "TableError",
    "TableRef",
    "WaitTimeout",
    "Watcher",
    "WatcherError",
    "astop",
    "backfill",
    "connected",
    "context",
    "default_hub",
    "disconnected",
    "gap",
    "health",
    "hookimpl",
    "muted",
    "on",
    "on_batch",
    "on_gap",
    "once",
    "receiver_failed",
    "run",
    "signal",
    "start",
    "status",
    "stop",
    "stream",
    "subscribe",
    "wait",
    "wait_for",
    "watch",
]
