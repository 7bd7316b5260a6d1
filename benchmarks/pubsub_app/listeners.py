"""A channel and its listener."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pgpubsub

from .models import Order

receivers: list[Callable[[Order], object]] = []


@dataclass
class OrderInserted(pgpubsub.TriggerChannel):
    """Orders that are inserted."""

    model = Order


@pgpubsub.post_insert_listener(OrderInserted)
def inserted(old: Order | None, new: Order) -> None:
    """Pass the order on to whoever measures."""
    for receiver in receivers:
        receiver(new)
