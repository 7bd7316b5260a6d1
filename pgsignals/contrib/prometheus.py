"""Metrics for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from ..core.errors import MissingExtraError
from ..core.metrics import COUNTERS, GAUGES

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
except ImportError as error:
    raise MissingExtraError(
        "Metrics for Prometheus need the package prometheus-client: "
        "pip install 'pgsignals[metrics]'"
    ) from error


class PrometheusMetrics:
    """The numbers of a Hub in a registry of prometheus_client, by default the global one.

    The metrics' names begin with ``namespace``. The label ``hub`` tells the Hubs of a process
    apart: give each its own PrometheusMetrics, with its own name; those of one name write to the
    same series.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        namespace: str = "pgsignals",
        *,
        hub: str = "default",
    ) -> None:
        self._hub = hub
        self._families = _families(REGISTRY if registry is None else registry, namespace)

    def count(self, name: str, amount: int, /, **labels: str) -> None:
        self._families[name].labels(hub=self._hub, **labels).inc(amount)

    def gauge(self, name: str, read: Callable[[], float], /, **labels: str) -> None:
        self._families[name].labels(hub=self._hub, **labels).set_function(read)


# The metrics of one namespace in one registry, which takes each name once only.
_Families = dict[str, Any]


_lock = threading.Lock()
_known: WeakKeyDictionary[CollectorRegistry, dict[str, _Families]] = WeakKeyDictionary()


def _families(registry: CollectorRegistry, namespace: str) -> _Families:
    with _lock:
        of_registry = _known.setdefault(registry, {})
        if namespace not in of_registry:
            of_registry[namespace] = {
                name: kind(name, help_, ("hub", *labels), namespace=namespace, registry=registry)
                for kind, measures in ((Counter, COUNTERS), (Gauge, GAUGES))
                for name, (help_, labels) in measures.items()
            }
        return of_registry[namespace]
