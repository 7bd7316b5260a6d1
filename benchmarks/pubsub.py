"""The listener of django-pgpubsub."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from psycopg2.extensions import parse_dsn

from .harness import DEADLINE


def _use(dsn: str) -> None:
    """Have threads that make their first connection from now on make it to this database."""
    # It takes psycopg2 where that can be imported, while Django prefers psycopg 3.
    os.environ["PGPUBSUB_USE_PSYCOPG_V3"] = "True"
    import django
    from django.conf import settings
    from django.db import connections

    given = parse_dsn(dsn)
    names = {"NAME": "dbname", "USER": "user", "HOST": "host", "PORT": "port"}
    database = {name: given[each] for name, each in names.items()}
    if not settings.configured:
        settings.configure(
            DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", **database}},
            INSTALLED_APPS=["pgtrigger", "pgpubsub", f"{__package__}.pubsub_app"],
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
            USE_TZ=True,
        )
        django.setup()
    connections.settings["default"].update(database)


@contextmanager
def listening(dsn: str, receiver: Callable[[Any], object]) -> Iterator[None]:
    """Installs the triggers and listens, by the loop of its ``listen``, which does not end."""
    _use(dsn)
    import pgtrigger
    from django.core.management import call_command
    from django.db import connection
    from pgpubsub.listen import listen_to_channels, process_notifications

    # Its registration is what makes the trigger.
    from .pubsub_app.listeners import receivers

    ready = threading.Event()
    ended, end = socket.socketpair()

    def listen() -> None:
        try:
            call_command("migrate", verbosity=0)
            pgtrigger.install()
            wrapper = listen_to_channels()
            ready.set()
            sockets = [wrapper.connection, ended]
            while ended not in select.select(sockets, [], [])[0]:
                process_notifications(wrapper)
        finally:
            connection.close()

    receivers.append(receiver)
    thread = threading.Thread(target=listen, name="django-pgpubsub")
    thread.start()
    try:
        if not ready.wait(DEADLINE):
            raise RuntimeError("django-pgpubsub does not listen")
        yield
    finally:
        end.close()
        thread.join()
        ended.close()
        receivers.remove(receiver)
