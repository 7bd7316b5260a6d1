"""Metrics for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Callable
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

    Their names begin with ``namespace``. The label ``hub`` tells the Hubs of a process apart: give
    each its own PrometheusMetrics, with its own name; those of one name write to the same series.
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
        self._families.counters[name].labels(hub=self._hub, **labels).inc(amount)

    def gauge(self, name: str, read: Callable[[], float], /, **labels: str) -> None:
        self._families.gauges[name].labels(hub=self._hub, **labels).set_function(read)


class _Families:
    """The metrics of one namespace in one registry, which takes each name once only."""

    def __init__(self, registry: CollectorRegistry, namespace: str) -> None:
        self.counters = {
            name: Counter(name, help_, ("hub", *labels), namespace=namespace, registry=registry)
            for name, (help_, labels) in COUNTERS.items()
        }
        self.gauges = {
            name: Gauge(name, help_, ("hub", *labels), namespace=namespace, registry=registry)
            for name, (help_, labels) in GAUGES.items()
        }


_lock = threading.Lock()
_known: WeakKeyDictionary[CollectorRegistry, dict[str, _Families]] = WeakKeyDictionary()


def _families(registry: CollectorRegistry, namespace: str) -> _Families:
    with _lock:
        of_registry = _known.setdefault(registry, {})
        if namespace not in of_registry:
            of_registry[namespace] = _Families(registry, namespace)
        return of_registry[namespace]
