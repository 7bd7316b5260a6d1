"""The triggers of what shop/signals.py watches."""

from django.db import migrations

import pgsignals
from pgsignals.contrib.django import InstallWatchers


class Migration(migrations.Migration):
    dependencies = [("shop", "0001_initial")]

    operations = [
        InstallWatchers(
            [
                pgsignals.watch("shop.Order", "inserted", "deleted"),
                pgsignals.watch("shop.Order", "updated", columns=["status"]),
            ]
        )
    ]
