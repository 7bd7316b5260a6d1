"""A system check: are the triggers in the database those that the watchers need?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg2
from django.core import checks

from ...connection import connect, dsn_of, redact
from ...errors import ConfigurationError, DatabaseError, TableError
from ...runs import all_resolvers
from ...triggers.catalogue import read_installed
from ...triggers.definitions import define
from ...triggers.installer import MISSING, OUTDATED, State, plan
from .conf import database, options

_HINT = (
    "Run `manage.py pgsignals install` as the tables' owner, or add the operation InstallWatchers "
    "to a migration."
)


def check_triggers(
    app_configs: Any, databases: Sequence[str] | None = None, **_: Any
) -> list[checks.CheckMessage]:
    """Compare, where the check of the database was asked for.

    A table that is missing is left to the migrations. Where the Hub installs by itself, what is
    missing is no more than an information.
    """
    if database() not in (databases or ()):
        return []
    try:
        chosen = options()
        states = _states(chosen)
    except ConfigurationError as error:
        return [checks.Error(str(error), id="pgsignals.E001")]
    except (DatabaseError, psycopg2.Error) as error:
        return [
            checks.Warning(
                f"The triggers could not be looked at: {redact(str(error)).strip()}",
                id="pgsignals.W002",
            )
        ]
    automatic = chosen.get("install", "auto") == "auto"
    kind = checks.Info if automatic else checks.Warning
    return [
        kind(_text(state), hint=_HINT, id=f"pgsignals.{'I' if automatic else 'W'}001")
        for state in states
        if state.status in (MISSING, OUTDATED)
    ]


def _states(chosen: dict[str, Any]) -> list[State]:
    namespace = chosen.get("namespace", "default")
    resolvers = all_resolvers(chosen.get("resolvers", ()))
    triggers = []
    connection = connect(dsn_of(chosen["dsn"]))
    try:
        with connection.cursor() as cursor:
            for watcher in chosen["watchers"]:
                try:
                    found = define(cursor, [watcher], resolvers, namespace)
                except TableError:
                    continue
                triggers += [definition.trigger for definition in found]
            return plan(triggers, read_installed(cursor, namespace)).states
    finally:
        connection.close()


def _text(state: State) -> str:
    label = f" (label {state.label!r})" if state.label is not None else ""
    detail = f": {state.detail}" if state.detail else ""
    return (
        f"The trigger for {state.op} on {state.schema}.{state.table}{label} is "
        f"{state.status.lower()}{detail}."
    )
