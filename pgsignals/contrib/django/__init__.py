"""Django: an application to put into ``INSTALLED_APPS``, by this module's name.

The module ``signals`` of each application, where receivers belong, is imported when Django is
ready; its list ``WATCHERS``, if it has one, says what to watch. Nothing is started by that:
``manage.py pgsignals listen`` does, or :func:`start` in ``wsgi.py`` or ``asgi.py``.

The setting ``PGSIGNALS``, a dict, is optional, and so is each of its keys:

``DATABASE``
    The alias in ``DATABASES`` of the database to watch; ``"default"``.
``DATABASES``
    Further databases, by alias: the keys that differ for each, its own ``WATCHERS``, and as ``HUB``
    the Hub, or its dotted path, whose receivers are called.
``DSN``
    A connection string to use instead of that database's settings.
``WATCHERS``
    Watchers, or the dotted path of a list of them, instead of those of the ``signals`` modules.
any other
    A parameter of :func:`pgsignals.start`, in capitals: ``INSTALL``, ``NAMESPACE``, ``WORKERS``, ….

A database connection that Django has in a worker's thread is closed around each event if it is
broken or older than its ``CONN_MAX_AGE``, as around a request.
"""

from __future__ import annotations

from ...core.errors import MissingExtraError

try:
    import django as _django  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        "pgsignals.contrib.django needs Django: pip install 'pgsignals[django]'"
    ) from error

from .conf import watchers
from .operations import InstallWatchers
from .runtime import start

__all__ = ["InstallWatchers", "start", "watchers"]
