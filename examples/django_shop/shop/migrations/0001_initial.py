"""Orders and their lines."""

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    operations = [
        migrations.CreateModel(
            "Order",
            [
                ("id", models.BigAutoField(primary_key=True)),
                ("customer", models.CharField(max_length=100)),
                ("status", models.CharField(db_default="new", default="new", max_length=20)),
            ],
        ),
        migrations.CreateModel(
            "Line",
            [
                ("id", models.BigAutoField(primary_key=True)),
                ("text", models.CharField(max_length=100)),
                (
                    "order",
                    models.ForeignKey(
                        "shop.order", django.db.models.deletion.CASCADE, related_name="lines"
                    ),
                ),
            ],
        ),
    ]
