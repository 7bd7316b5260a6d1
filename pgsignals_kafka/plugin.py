"""The hooks that pgsignals calls for ``kafka://`` URLs."""

from __future__ import annotations

import pgsignals
from pgsignals.urls import scheme_of

from .broadcaster import KafkaBroadcaster
from .source import KafkaSource


@pgsignals.hookimpl
def pgsignals_broadcaster(url: str) -> KafkaBroadcaster | None:
    return KafkaBroadcaster.from_url(url) if scheme_of(url) == "kafka" else None


@pgsignals.hookimpl
def pgsignals_source(url: str) -> KafkaSource | None:
    return KafkaSource.from_url(url) if scheme_of(url) == "kafka" else None
