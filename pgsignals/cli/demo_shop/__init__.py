"""A shop that runs on a PostgreSQL of its own for a while, and the events that come of it."""

from __future__ import annotations

import statistics
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Protocol

import pgsignals
from pgsignals.cli.demo_shop.shop import Shop
from pgsignals.core.transport import Delivery
from pgsignals.testing import Server

WATCHERS = [
    "customers",
    pgsignals.watch("products", "updated", columns=["price", "stock"], extra=["name"]),
    pgsignals.watch("orders", "inserted", "deleted", extra=["customer_id", "total"]),
    pgsignals.watch("orders", "updated", columns=["status"]),
    pgsignals.watch(
        "products",
        "updated",
        when="NEW.stock < 5 AND OLD.stock >= 5",
        extra=["name", "stock"],
        label="running_low",
    ),
    "order_items",
]


class Display(Protocol):
    """Shows the events of the demonstration."""

    def ready(self, server: Server, dsn: str) -> None:
        """Tell that the shop is about to open."""

    def event(self, event: pgsignals.Event, seen: Seen) -> None:
        """Show an event, which ``seen`` counts already."""


@dataclass
class Seen:
    """The counts of events so far. Latencies: seconds from the statement to the receiver."""

    events: Counter[tuple[str, str]] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    gaps: int = 0
    rolled_back: int = 0

    @property
    def total(self) -> int:
        """The number of events."""
        return sum(self.events.values())

    @property
    def latency(self) -> float | None:
        """The median latency; None before the first event."""
        return statistics.median(self.latencies) if self.latencies else None


def run(
    display: Display, wait: Callable[[], object], seed: int = 1, delivery: Delivery = "notify"
) -> Seen:
    """Open the shop, show what it does until ``wait`` returns, and clear everything away.

    Raises ServerNotFound when this machine has no PostgreSQL.
    """
    seen = Seen()
    hub = pgsignals.Hub()

    @hub.on("customers")
    @hub.on("products")
    @hub.on("orders")
    @hub.on("order_items")
    @hub.on("running_low")
    def show(event: pgsignals.Event) -> None:
        seen.latencies.append((datetime.now(timezone.utc) - event.at).total_seconds())
        seen.events[event.label or event.table, event.op] += 1
        display.event(event, seen)

    @hub.on_gap
    def count(gap: pgsignals.Gap) -> None:
        seen.gaps += 1

    with Server() as server:
        dsn = server.create_database("shop")
        shop = Shop(dsn, seed)
        shop.create_tables()
        with hub.start(dsn, WATCHERS, delivery=delivery):
            display.ready(server, dsn)
            closing = threading.Event()
            writer = threading.Thread(target=shop.do_business, args=(closing,), daemon=True)
            writer.start()
            try:
                wait()
            finally:
                closing.set()
                writer.join()
    seen.rolled_back = shop.rolled_back
    return seen
