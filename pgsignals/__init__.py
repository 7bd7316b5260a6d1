"""PostgreSQL changes as Python signals.

The functions here act on one default Hub; ``Hub()`` makes further ones, for a second database.
"""

from __future__ import annotations

from .consumers.backfills.requests import Backfill
from .consumers.once import once
from .core.errors import (
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
from .core.events import Batch, Event, Gap
from .core.home import Home
from .core.tables import Column, Resolver, Table, TableRef
from .core.watchers import Watcher, watch
from .dispatch.registry import Subscription
from .dispatch.streams import Stream
from .hub.hub import Hub
from .hub.status import Health, Status
from .plugins.hookspecs import hookimpl
from .postgres.transaction import context, muted

__version__ = "0.2.0"

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
    "Home",
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
