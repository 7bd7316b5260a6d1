"""A system check: are the triggers in the database those that the watchers need?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg2
from django.core import checks

from ...connection import connect, dsn_of, redact
from ...errors import ConfigurationError, DatabaseError, TableError, near
from ...events import model_name
from ...outbox import schema
from ...runs import all_resolvers
from ...tables import Resolver, resolve
from ...triggers.catalogue import read_installed
from ...triggers.definitions import define
from ...triggers.installer import MISSING, OUTDATED, State, plan
from ...watchers import Watcher
from ..migrations import is_durable
from .conf import database, default_delivery, options

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
        found = _differences(chosen)
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
        kind(text, hint=_HINT, id=f"pgsignals.{'I' if automatic else 'W'}001") for text in found
    ]


def _differences(chosen: dict[str, Any]) -> list[str]:
    durable = is_durable(default_delivery())
    namespace = chosen.get("namespace", "default")
    resolvers = all_resolvers(chosen.get("resolvers", ()))
    triggers = []
    texts = []
    connection = connect(dsn_of(chosen["dsn"]))
    try:
        with connection.cursor() as cursor:
            for watcher in chosen["watchers"]:
                try:
                    found = define(cursor, [watcher], resolvers, namespace, durable)
                except TableError:
                    # What is missing, migrations may have yet to make; but not for no field.
                    _check_fields(watcher, resolvers)
                    continue
                triggers += [definition.trigger for definition in found]
            if durable and triggers and schema.read_version(cursor) < schema.VERSION:
                texts.append(
                    f"The schema {schema.NAME}, which the outbox needs, is missing or outdated."
                )
            states = plan(triggers, read_installed(cursor, namespace)).states
    finally:
        connection.close()
    return texts + [_text(each) for each in states if each.status in (MISSING, OUTDATED)]


def _check_fields(watcher: Watcher, resolvers: Sequence[Resolver]) -> None:
    """Raise ConfigurationError for a column that the model, too, does not have."""
    ref, _ = resolve(watcher.model, resolvers)
    known = {*ref.attributes, *ref.attributes.values()}
    for name in (*watcher.columns, *watcher.extra):
        if known and name not in known:
            raise ConfigurationError(
                f"The watcher {watcher} asks for {name!r}, which is no field of "
                f"{model_name(watcher.model)}{near(name, ref.attributes)} "
                f"Its fields: {', '.join(ref.attributes)}."
            )


def _text(state: State) -> str:
    label = f" (label {state.label!r})" if state.label is not None else ""
    detail = f": {state.detail}" if state.detail else ""
    return (
        f"The trigger for {state.op} on {state.schema}.{state.table}{label} is "
        f"{state.status.lower()}{detail}."
    )
