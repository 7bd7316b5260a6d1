"""What happens when orders change."""

import pgsignals

from .models import Order

WATCHERS = [
    pgsignals.watch(Order, "inserted", "deleted"),
    pgsignals.watch(Order, "updated", columns=["status"]),
]


@pgsignals.on(Order, "inserted")
def ordered(event: pgsignals.Event) -> None:
    """Show the order with its lines, by two queries."""
    order = event.load(prefetch_related=["lines"])
    if order is not None:
        lines = ", ".join(line.text for line in order.lines.all()) or "nothing yet"
        print(f"order {order.id} of {order.customer}: {lines}", flush=True)


@pgsignals.on(Order, "updated")
def moved_on(event: pgsignals.Event) -> None:
    """Show how the order fares."""
    print(f"order {event.id}: {event.old['status']} -> {event.values['status']}", flush=True)
