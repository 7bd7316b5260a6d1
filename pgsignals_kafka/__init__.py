"""Events of pgsignals to Apache Kafka and from it."""

from __future__ import annotations

from .broadcaster import KafkaBroadcaster
from .source import KafkaSource

__version__ = "0.2.0"

__all__ = ["KafkaBroadcaster", "KafkaSource"]
