"""What happens when money comes, whoever writes it down."""

import pgsignals
from shop.models import Order

from .models import Payment

WATCHERS = [pgsignals.watch(Payment, "inserted", extra=["order_id", "amount"])]


@pgsignals.on(Payment, "inserted")
def paid(event: pgsignals.Event) -> None:
    """Mark the order as paid, which in turn is an event of the order."""
    print(f"payment {event.id}: {event.values['amount']}", flush=True)
    Order.objects.filter(id=event.values["order_id"], status="new").update(status="paid")
