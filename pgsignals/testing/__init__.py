"""Helpers for tests of pgsignals, and of applications that use it."""

from __future__ import annotations

from pgsignals.testing.event_log import EventLog
from pgsignals.testing.server import (
    Installation,
    Server,
    ServerFailed,
    ServerNotFound,
    find_installations,
)
from pgsignals.testing.simulation import Simulation, simulated

__all__ = [
    "EventLog",
    "Installation",
    "Server",
    "ServerFailed",
    "ServerNotFound",
    "Simulation",
    "find_installations",
    "simulated",
]
