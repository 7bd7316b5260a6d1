"""Events of pgsignals to NATS JetStream and from it."""

from __future__ import annotations

from .broadcaster import NatsBroadcaster
from .source import NatsSource

__version__ = "0.2.0"

__all__ = ["NatsBroadcaster", "NatsSource"]
