"""The application's configuration, which imports receivers when Django is ready, and no more."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks
from django.utils.module_loading import autodiscover_modules

from .checks import check_triggers


class PgSignalsConfig(AppConfig):
    """The application; its label is ``pgsignals``."""

    name = "pgsignals.contrib.django"
    label = "pgsignals"
    verbose_name = "PostgreSQL signals"

    def ready(self) -> None:
        """Import the module ``signals`` of each application."""
        autodiscover_modules("signals")
        checks.register(check_triggers, checks.Tags.database)
