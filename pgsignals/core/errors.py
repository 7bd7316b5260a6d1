"""Every error that pgsignals raises, as one small tree.

::

    PgSignalsError
    ├── ConfigurationError          what the caller asked for cannot be (also a ValueError)
    │   ├── WatcherError            a watcher's declaration is wrong
    │   │   ├── TableError          the table is missing, a view, or lacks a column
    │   │   └── ModelError          no resolver knows what table the model stands for
    │   └── ReceiverError           a receiver listens to what no watcher delivers
    ├── DatabaseError               PostgreSQL could not be used as asked
    │   ├── ConnectError            no connection could be made
    │   ├── PrivilegeError          the role may not do what is needed
    │   ├── InstallLockError        a table stayed locked by somebody else
    │   └── DriftError              ``install="check"`` found triggers missing or outdated
    ├── StateError                  the call does not fit what the Hub is doing now
    ├── WaitTimeout                 an awaited event did not come (also a TimeoutError)
    ├── PayloadError                a message on our channel that pgsignals did not write
    ├── PluginError                 an installed plugin could not be used
    ├── BrokerError                 a message broker could not be used as asked
    └── MissingExtraError           an optional package is not installed (also an ImportError)

Each message says what was given, what is allowed, and the fix. No message carries a password.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PgSignalsError(Exception):
    """The root of all errors raised by pgsignals."""


class ConfigurationError(PgSignalsError, ValueError):
    """The caller asked for something that cannot be."""


class WatcherError(ConfigurationError):
    """A watcher's declaration is wrong."""


class TableError(WatcherError):
    """The watched table is missing, is not a table, or lacks a column."""


class ModelError(WatcherError):
    """No resolver knows what table the model stands for."""


class ReceiverError(ConfigurationError):
    """A receiver listens to something that no watcher delivers."""


class DatabaseError(PgSignalsError):
    """PostgreSQL could not be used as asked."""


class ConnectError(DatabaseError):
    """No connection to PostgreSQL could be made."""


class PrivilegeError(DatabaseError):
    """The database role lacks a privilege."""


class InstallLockError(DatabaseError):
    """A table that needs a trigger stayed locked longer than the bounded wait."""


class DriftError(DatabaseError):
    """The installed triggers are not the ones that the watchers need."""


class StateError(PgSignalsError):
    """The call does not fit the state of the Hub."""


class WaitTimeout(PgSignalsError, TimeoutError):
    """An awaited event did not arrive in time."""


class PayloadError(PgSignalsError):
    """A message that pgsignals did not write, or wrote against another definition of a table."""


class PluginError(PgSignalsError):
    """An installed plugin could not be loaded or called."""


class BrokerError(PgSignalsError):
    """A message broker could not be reached, or did not take what it was sent."""


class MissingExtraError(PgSignalsError, ImportError):
    """A feature needs an optional package that is not installed."""


def near(given: str, known: Iterable[str]) -> str:
    """Return `` (did you mean …?).`` for a message's end, or a full stop if nothing is near.

    Letters are compared whatever their case.
    """
    by_letters: dict[str, str] = {}
    for each in known:
        by_letters.setdefault(each.lower(), each)
    found = difflib.get_close_matches(given.lower(), list(by_letters), n=3, cutoff=0.6)
    close = [by_letters[each] for each in found if by_letters[each] != given]
    return f" (did you mean {' or '.join(map(repr, close))}?)." if close else "."
