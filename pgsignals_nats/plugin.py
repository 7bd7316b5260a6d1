"""The hooks that pgsignals calls for ``nats://`` URLs."""

from __future__ import annotations

import pgsignals
from pgsignals.urls import scheme_of

from .broadcaster import NatsBroadcaster
from .source import NatsSource


@pgsignals.hookimpl
def pgsignals_broadcaster(url: str) -> NatsBroadcaster | None:
    return NatsBroadcaster.from_url(url) if scheme_of(url) == "nats" else None


@pgsignals.hookimpl
def pgsignals_source(url: str) -> NatsSource | None:
    return NatsSource.from_url(url) if scheme_of(url) == "nats" else None
