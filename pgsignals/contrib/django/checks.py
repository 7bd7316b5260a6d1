"""A system check that the triggers in the database are those that the watchers need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg2
from django.core import checks

from ...core.errors import ConfigurationError, DatabaseError, TableError, near
from ...core.events import model_name
from ...core.redaction import error_text
from ...core.tables import Resolver
from ...core.watchers import Watcher
from ...hub.options import Options, all_resolvers
from ...outbox import schema
from ...postgres.connection import opened
from ...postgres.dsn import dsn_of
from ...triggers.catalogue import read_installed
from ...triggers.definitions import define
from ...triggers.installer import MISSING, OUTDATED, State, plan
from ...triggers.table_lookup import resolve
from .conf import databases as watched
from .conf import options

_HINT = (
    "Run `manage.py pgsignals install` as the tables' owner, or add the operation InstallWatchers "
    "to a migration."
)


def check_triggers(
    app_configs: Any, databases: Sequence[str] | None = None, **_: Any
) -> list[checks.CheckMessage]:
    """Compare the triggers of those databases whose check was asked for.

    A table that is missing is left to the migrations. If the Hub installs triggers by itself, a
    missing one is no more than an information.
    """
    asked = [alias for alias in watched() if alias in (databases or ())]
    return [message for alias in asked for message in _check(alias)]


def _check(alias: str) -> list[checks.CheckMessage]:
    try:
        chosen = options(alias)
        found = _differences(chosen)
    except ConfigurationError as error:
        return [checks.Error(str(error), id="pgsignals.E001")]
    except (DatabaseError, psycopg2.Error) as error:
        return [
            checks.Warning(
                f"The triggers could not be looked at: {error_text(error)}",
                id="pgsignals.W002",
            )
        ]
    automatic = chosen.install == "auto"
    kind = checks.Info if automatic else checks.Warning
    return [
        kind(text, hint=_HINT, id=f"pgsignals.{'I' if automatic else 'W'}001") for text in found
    ]


def _differences(chosen: Options) -> list[str]:
    transport, namespace = chosen.transport, chosen.namespace
    resolvers = all_resolvers(chosen.resolvers)
    triggers = []
    texts = []
    with opened(dsn_of(chosen.dsn)) as cursor:
        for watcher in chosen.watchers:
            try:
                found = define(
                    cursor, [watcher], resolvers, namespace, transport, capture=chosen.capture
                )
            except TableError:
                # Migrations may have yet to make what is missing, but no column without a field.
                _check_fields(watcher, resolvers)
                continue
            triggers += [definition.trigger for definition in found]
        if transport.durable and triggers and schema.read_version(cursor) < schema.VERSION:
            texts.append(
                f"The schema {schema.NAME}, which durable delivery needs, is missing or outdated."
            )
        states = plan(triggers, read_installed(cursor, namespace)).states
    return texts + [_text(each) for each in states if each.status in (MISSING, OUTDATED)]


def _check_fields(watcher: Watcher, resolvers: Sequence[Resolver]) -> None:
    """Raise ConfigurationError for a column that the model does not have either."""
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
