"""Orders and their lines."""

from django.db import models


class Order(models.Model):
    """What a customer wants."""

    customer = models.CharField(max_length=100)
    status = models.CharField(max_length=20, default="new", db_default="new")


class Line(models.Model):
    """One thing of an order."""

    order = models.ForeignKey(Order, models.CASCADE, related_name="lines")
    text = models.CharField(max_length=100)
