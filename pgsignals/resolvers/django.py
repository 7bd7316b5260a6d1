"""Django's models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..errors import ModelError
from ..tables import Table, TableRef
from ..transaction import is_django_connection
from .plain import as_text, parse_name, wanted_keys


class DjangoResolver:
    """Subclasses of ``django.db.models.Model``.

    Records are instances, through a database alias, a Django connection, a QuerySet of the model
    (with what it selects and restricts), or None for the model's default database.
    ``select_related`` and ``prefetch_related`` are as the QuerySet's methods take them.
    """

    name = "django"

    def resolve(self, model: Any) -> TableRef | None:
        if not _is_model(model):
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
        if not _is_model(model):
            return None
        queryset = _queryset(model, session)
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
        any_field = models.TextField()  # Django asks for one; nothing is converted by it
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


def _is_model(model: Any) -> bool:
    models = sys.modules.get("django.db.models")
    return models is not None and isinstance(model, type) and issubclass(model, models.Model)


def _queryset(model: Any, session: Any) -> Any:
    models: Any = sys.modules["django.db.models"]
    if isinstance(session, models.QuerySet):
        same = session.model._meta.concrete_model is model._meta.concrete_model
        return session if same else None
    if is_django_connection(session):
        session = session.alias
    if session is None:
        session = model._default_manager.db
    return model._base_manager.using(session) if isinstance(session, str) else None


def _parse_db_table(db_table: str) -> tuple[str | None, str]:
    """Django puts the name between quotes unless it has some at both ends; nothing is escaped."""
    whole = db_table.startswith('"') and db_table.endswith('"')
    return parse_name(db_table if whole else f'"{db_table}"')
