"""SQLAlchemy's models: mapped classes (SQLModel's and Flask-SQLAlchemy's too) and Tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ...core.errors import ConfigurationError, ModelError, near
from ...core.events import model_name
from ...core.home import Home
from ...core.tables import Table, TableRef
from ...postgres.dsn import dsn_of
from ...postgres.transaction import name_parameters, named
from .plain import wanted_keys


class SQLAlchemyResolver:
    """Mapped classes and ``sqlalchemy.Table``.

    Records are the session's own objects, refreshed, through a Session or a scoped_session, with
    ``options`` as ``select`` takes them. Tables give dicts by column key, and so do classes through
    a Connection or an Engine, by attribute.

    In an application context of Flask, a model whose ``__bind_key__``, or Table whose ``bind_key``,
    says that it is of another database than the watched one is refused, unless ``routed`` is False.
    """

    name = "sqlalchemy"

    def __init__(self, routed: bool = True) -> None:
        self._routed = routed

    def resolve(self, model: Any) -> TableRef | None:
        sqlalchemy: Any = sys.modules.get("sqlalchemy")
        if sqlalchemy is None:
            return None
        if isinstance(model, sqlalchemy.Table):
            attributes = {column.key: column.name for column in model.c}
            return _ref(model, attributes, home=self._home(model, model))
        if isinstance(model, sqlalchemy.FromClause) or _is_alias(model):
            raise ModelError(
                f"{model!r} is not a table but selects from one. Give the Table or the mapped "
                "class that it selects from."
            )
        if not isinstance(model, type):
            return None
        mapper = sqlalchemy.inspect(model, raiseerr=False)
        if mapper is not None:
            ref = _resolve_mapper(mapper)
            return replace(ref, home=self._home(model, mapper.local_table))
        if isinstance(getattr(model, "metadata", None), sqlalchemy.MetaData):
            raise ModelError(
                f"{model.__name__} is not mapped to a table: it is abstract, a declarative base or "
                "an SQLModel without table=True. Give the classes that are mapped, one by one."
            )
        return None

    def _home(self, model: Any, table: Any) -> Home | None:
        """Return the database in which Flask-SQLAlchemy keeps a table; None if it is not known.

        Without Flask-SQLAlchemy, neither a model nor its MetaData tells the engine.
        """
        flask: Any = sys.modules.get("flask")
        info = table.metadata.info
        if not self._routed or "bind_key" not in info or flask is None:
            return None
        if not flask.has_app_context():
            return None
        extension = flask.current_app.extensions.get("sqlalchemy")
        engines = getattr(extension, "engines", {})
        if (key := info["bind_key"]) in engines:
            return _engine_home(model_name(model), key, engines[key])
        if key is None or extension is None:
            return None
        raise ModelError(
            f"{model_name(model)} has the bind key {key!r}, which SQLALCHEMY_BINDS of the "
            f"application {flask.current_app.name!r} lacks{near(str(key), filter(None, engines))}"
        )

    def load(
        self,
        model: Any,
        table: Table,
        session: Any,
        ids: Sequence[tuple[object, ...]],
        options: Sequence[Any] = (),
    ) -> list[Any] | None:
        sqlalchemy: Any = sys.modules.get("sqlalchemy")
        orm: Any = sys.modules.get("sqlalchemy.orm")
        if sqlalchemy is None:
            return None
        if isinstance(session, sqlalchemy.Engine):
            with session.connect() as connection:
                return self.load(model, table, connection, ids, options)
        if orm is not None and isinstance(session, orm.scoped_session):
            session = session()
        in_orm = orm is not None and isinstance(session, orm.Session)
        if not in_orm and not isinstance(session, sqlalchemy.Connection):
            return None
        as_objects = in_orm and not isinstance(model, sqlalchemy.Table)
        if options and not as_objects:
            raise ConfigurationError(
                f"load() gives dicts of {model_name(model)} here, and options= say what to load "
                "with objects: give a Session and watch a mapped class, or leave them out."
            )
        if not ids:
            return []

        if isinstance(model, sqlalchemy.Table):
            of_table, selected = model, [column.label(column.key) for column in model.c]
        else:
            mapper = sqlalchemy.inspect(model)
            of_table = mapper.local_table
            names = [name for name, _ in _attributes(mapper)]
            selected = (
                [model] if as_objects else [getattr(model, name).label(name) for name in names]
            )
        query, parameters = wanted_keys(table, ids)
        keys = [f"k{number}" for number in range(len(table.key))]
        wanted = (
            sqlalchemy.text(named(query))
            .columns(*map(sqlalchemy.column, [*keys, "position"]))
            .subquery("pgsignals_wanted")
        )
        by_name = {column.name: column for column in of_table.c}
        same = [by_name[name] == wanted.c[key] for name, key in zip(table.key, keys, strict=True)]
        statement = (
            sqlalchemy.select(*selected)
            .select_from(model)
            .join(wanted, sqlalchemy.and_(*same))
            .order_by(wanted.c.position)
            .options(*options)
            # Otherwise a record that the session has read before would keep its former values.
            .execution_options(populate_existing=True)
        )
        # Flask-SQLAlchemy's session does not find a Table's engine by the statement alone.
        of_which = {"bind_arguments": {"clause": model}} if in_orm and not as_objects else {}
        result = session.execute(statement, name_parameters(parameters), **of_which)
        if as_objects:
            return list(result.scalars().unique())
        return [dict(row) for row in result.mappings()]


def _engine_home(name: str, key: str | None, engine: Any) -> Home:
    bind = "Flask-SQLAlchemy's default database" if key is None else f"the bind {key!r}"
    keyed = "" if key is None else f"bind_key={key!r}, "
    found = "db.engine" if key is None else f"db.engines[{key!r}]"
    return Home(
        name,
        bind,
        dsn_of(engine) if engine.dialect.name == "postgresql" else None,
        f"Start a Hub of its own for it: PgSignals({keyed}watchers=[{name}]), or "
        f"pgsignals.Hub().start({found}, [{name}]).",
    )


def _resolve_mapper(mapper: Any) -> TableRef:
    sqlalchemy: Any = sys.modules["sqlalchemy"]
    table = mapper.local_table
    if not isinstance(table, sqlalchemy.Table):
        raise ModelError(
            f"{mapper.class_.__name__} is mapped to a {type(table).__name__.lower()}, which has no "
            "rows of its own. Give the classes or Tables that it is made of."
        )
    attributes, elsewhere = {}, {}
    for name, columns in _attributes(mapper):
        own = [column for column in columns if column.table is table]
        if own:
            attributes[name] = own[0].name
        else:
            elsewhere[name] = str(columns[0].table)
    key = [column for column in mapper.primary_key if column.table is table]
    return _ref(table, attributes, key=key, only=_restriction(mapper), elsewhere=elsewhere)


def _ref(table: Any, attributes: dict[str, str], key: Sequence[Any] = (), **more: Any) -> TableRef:
    # SQLAlchemy's names may be `quoted_name`s, which drivers and encoders do not know as text.
    return TableRef(
        name=str(table.name),
        schema=None if table.schema is None else str(table.schema),
        attributes={str(attribute): str(column) for attribute, column in attributes.items()},
        key=tuple(str(column.name) for column in list(table.primary_key) or key),
        **more,
    )


def _attributes(mapper: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield the attributes that are columns of a table, not expressions."""
    sqlalchemy: Any = sys.modules["sqlalchemy"]
    for attribute in mapper.column_attrs:
        columns = [column for column in attribute.columns if isinstance(column, sqlalchemy.Column)]
        if columns:
            yield attribute.key, columns


def _restriction(mapper: Any) -> tuple[str, tuple[object, ...]] | None:
    """Return the column and values that tell the class's rows, if it shares its parent's table."""
    discriminator = mapper.polymorphic_on
    if not mapper.single or discriminator is None:
        return None
    name = mapper.class_.__name__
    if getattr(discriminator, "table", None) is not mapper.local_table:
        raise ModelError(
            f"The rows of {name} cannot be told by a column of its table "
            f"{mapper.local_table.name}. Give its parent {mapper.inherits.class_.__name__}."
        )
    identities = [
        descendant.polymorphic_identity
        for descendant in mapper.self_and_descendants
        if descendant.polymorphic_identity is not None
    ]
    if not identities:
        raise ModelError(
            f"No row is one of {name}: neither it nor a subclass has a polymorphic_identity. Give "
            f"it one, or watch its parent {mapper.inherits.class_.__name__}."
        )
    dialect = sys.modules["sqlalchemy"].dialects.registry.load("postgresql.psycopg2")()
    as_stored = discriminator.type.dialect_impl(dialect).bind_processor(dialect)
    stored = map(as_stored, identities) if as_stored else identities
    return str(discriminator.name), tuple(map(_without_enum, stored))


def _without_enum(value: Any) -> Any:
    """Return the plain value of an Enum member that is also a text or a number, as drivers do."""
    if isinstance(value, str):
        return str.__str__(value)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_alias(model: object) -> bool:
    orm: Any = sys.modules.get("sqlalchemy.orm")
    return orm is not None and isinstance(model, orm.util.AliasedClass)
