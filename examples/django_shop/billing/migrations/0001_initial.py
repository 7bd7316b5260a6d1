"""Payments, and the trigger that tells of them."""

import django.db.models.deletion
from django.db import migrations, models

import pgsignals
from pgsignals.contrib.django import InstallWatchers


class Migration(migrations.Migration):
    initial = True
    dependencies = [("shop", "0001_initial")]

    operations = [
        migrations.CreateModel(
            "Payment",
            [
                ("id", models.BigAutoField(primary_key=True)),
                ("amount", models.DecimalField(decimal_places=2, max_digits=10)),
                ("order", models.ForeignKey("shop.order", django.db.models.deletion.CASCADE)),
            ],
        ),
        InstallWatchers(
            [pgsignals.watch("billing.Payment", "inserted", extra=["order_id", "amount"])]
        ),
    ]
