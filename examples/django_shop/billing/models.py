"""Payments."""

from django.db import models

from shop.models import Order


class Payment(models.Model):
    """Money that has come for an order."""

    order = models.ForeignKey(Order, models.CASCADE)
    amount = models.DecimalField(max_digits=10, decimal_places=2)
