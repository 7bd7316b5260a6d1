"""The table that all benchmarks insert into."""

from __future__ import annotations

from django.db import models


class Order(models.Model):
    """An order."""

    customer_id = models.BigIntegerField()
    status = models.TextField()
    total = models.DecimalField(max_digits=10, decimal_places=2)
    created_at = models.DateTimeField()

    class Meta:
        db_table = "orders"
        managed = False
