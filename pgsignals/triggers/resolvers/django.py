"""Django's models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import psycopg2.extensions

from ...core.errors import ConfigurationError, ModelError
from ...core.home import Home
from ...core.tables import Table, TableRef
from ...postgres.transaction import is_django_connection
from .plain import as_text, parse_name, wanted_keys


class DjangoResolver:
    """Subclasses of ``django.db.models.Model``.

    Records are instances, through a database alias, a Django connection, a QuerySet of the model
    (with what it selects and restricts), or None for the model's default database.
    ``select_related`` and ``prefetch_related`` are as the QuerySet's methods take them.

    A model that a router (its ``db_for_write``) sends to another database than the watched one is
    refused, unless ``routed`` is False. ``using`` is the alias that None stands for in ``load``, by
    default where the routers have the model written.
    """

    name = "django"

    def __init__(self, using: str | None = None, routed: bool = True) -> None:
        self._using = using
        self._routed = routed

    def resolve(self, model: Any) -> TableRef | None:
        if not is_model(model):
            return None
        meta = getattr(model, "_meta", None)
        if meta is None or meta.abstract:
            raise ModelError(
                f"{model.__name__} is abstract and has no table. Give the models that inherit it, "
                "one by one."
            )
        meta = meta.concrete_model._meta
        schema, name = _parse_db_table(meta.db_table)
        own = meta.local_concrete_fields
        # A foreign key `user` is also `user_id`, by which its value goes; that one comes first.
        attributes = {field.attname: field.column for field in own}
        for field in own:
            attributes.setdefault(field.name, field.column)
        return TableRef(
            name,
            schema,
            attributes,
            key=tuple(field.column for field in getattr(meta, "pk_fields", [meta.pk])),
            elsewhere={
                field.attname: field.model._meta.db_table
                for field in meta.concrete_fields
                if field not in own
            },
            home=_home(model) if self._routed else None,
        )

    def load(
        self,
        model: Any,
        table: Table,
        session: Any,
        ids: Sequence[tuple[object, ...]],
        select_related: str | Sequence[str] = (),
        prefetch_related: str | Sequence[Any] = (),
    ) -> list[Any] | None:
        if not is_model(model):
            return None
        queryset = _queryset(model, session, self._using)
        if queryset is None:
            return None
        if not ids:
            return []
        by_column = {
            field.column: field for field in model._meta.concrete_model._meta.local_concrete_fields
        }
        fields = [by_column[name] for name in table.key]
        wanted, parameters = wanted_keys(table, ids)
        names = ", ".join(f"k{number}" for number in range(len(fields)))
        models: Any = sys.modules["django.db.models"]
        any_field = models.TextField()  # Django asks for a field; it converts nothing here
        columns = models.Func(
            *(models.F(field.attname) for field in fields), function="ROW", output_field=any_field
        )
        among = models.expressions.RawSQL(
            f"SELECT {names} FROM ({wanted}) AS wanted", parameters, any_field
        )
        found = queryset.filter(models.lookups.In(columns, among))
        # Without names select_related() would follow every foreign key.
        if select_related:
            found = found.select_related(*_listed(select_related))
        found = found.prefetch_related(*_listed(prefetch_related))

        position = {key: number for number, key in enumerate(zip(*parameters, strict=True))}

        def place(record: Any) -> int:
            values = [field.get_prep_value(getattr(record, field.attname)) for field in fields]
            key = tuple(map(as_text, values, table.key_columns))
            return position.get(key, len(position))

        return sorted(found, key=place)


def _listed(names: str | Sequence[Any]) -> Sequence[Any]:
    return [names] if isinstance(names, str) else names


def is_model(model: Any) -> bool:
    """Whether ``model`` is a class of Django's models."""
    models = sys.modules.get("django.db.models")
    return models is not None and isinstance(model, type) and issubclass(model, models.Model)


# The options that Django keeps beside the parameters of libpq.
_NOT_LIBPQ = (
    "assume_role",
    "client_encoding",
    "context",
    "cursor_factory",
    "isolation_level",
    "pool",
    "prepare_threshold",
    "server_side_binding",
)


def connection_dsn(connection: Any) -> str:
    """Return the connection string of one of Django's connections.

    Raises ConfigurationError for a connection to another kind of database.
    """
    if connection.vendor != "postgresql":
        raise ConfigurationError(
            f"The database {connection.alias!r} is of {connection.vendor}: name one of PostgreSQL "
            "in PGSIGNALS['DATABASE']."
        )
    parameters = {
        "dbname" if name == "database" else name: value
        for name, value in connection.get_connection_params().items()
        if name not in _NOT_LIBPQ and value is not None
    }
    return psycopg2.extensions.make_dsn(**{name: str(it) for name, it in parameters.items()})


def _home(model: Any) -> Home | None:
    """Return the database to which a router sends the model's writes; None if none decides.

    Django's default would not do in its place: programs without routers name the database by
    ``using()``.
    """
    db: Any = sys.modules.get("django.db")
    alias = db and next(
        (
            chosen
            for router in db.router.routers
            if (chosen := getattr(router, "db_for_write", lambda _: None)(model))
        ),
        None,
    )
    if not alias:
        return None
    connection = db.connections[alias]
    return Home(
        model.__name__,
        f"the database {alias!r} of DATABASES, to which a router sends it",
        connection_dsn(connection) if connection.vendor == "postgresql" else None,
        f"Give {alias!r} a Hub of its own in PGSIGNALS['DATABASES'], or by "
        f"pgsignals.contrib.django.start(pgsignals.Hub(), database={alias!r}, "
        f"watchers=[{model.__name__}]).",
    )


def _queryset(model: Any, session: Any, using: str | None) -> Any:
    models: Any = sys.modules["django.db.models"]
    if isinstance(session, models.QuerySet):
        same = session.model._meta.concrete_model is model._meta.concrete_model
        return session if same else None
    if is_django_connection(session):
        session = session.alias
    if session is None:
        # Not where a router has it read: a replica may not have the event's record yet.
        session = using or sys.modules["django.db"].router.db_for_write(model)
    return model._base_manager.using(session) if isinstance(session, str) else None


def _parse_db_table(db_table: str) -> tuple[str | None, str]:
    """Return schema and name: Django quotes a name unless both ends have quotes, escaping none."""
    whole = db_table.startswith('"') and db_table.endswith('"')
    return parse_name(db_table if whole else f'"{db_table}"')
