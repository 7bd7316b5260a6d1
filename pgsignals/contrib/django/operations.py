"""An operation for migrations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from django.db import DatabaseError, router, transaction
from django.db.migrations.operations.base import Operation
from django.db.migrations.serializer import BaseSerializer
from django.db.migrations.writer import MigrationWriter
from psycopg2.extensions import cursor as Cursor

from ...errors import TableError, WatcherError
from ...events import model_name
from ...resolvers import DjangoResolver
from ...runs import all_resolvers
from ...tables import Resolver, TableRef, resolve
from ...triggers.definitions import define
from ...watchers import Watcher, normalize
from ..migrations import (
    Change,
    borrowed_cursor,
    installing,
    is_durable,
    removing,
    run,
    source,
)
from .conf import default_delivery, default_namespace, dsn_of


class InstallWatchers(Operation):
    """Install the triggers of watchers; backwards, remove them.

    ``watchers`` are what :func:`pgsignals.start` takes, with models as ``"app_label.Model"``, whose
    columns go by their fields' names as they are at this point of the migrations, or tables by
    their names. ``namespace`` and ``delivery`` are by default what PGSIGNALS says when
    the migration runs; for ``"outbox"`` the schema ``pgsignals`` is made or upgraded too.

    A trigger that is as it should be is left alone. Backwards, one that somebody listens to or that
    a consumer of the outbox reads is left, with a warning of PostgreSQL's, and the schema stays. A
    table that is locked by somebody else for more than half a second makes the migration fail with
    InstallLockError, and changes nothing: run it again.
    """

    reduces_to_sql = True
    reversible = True

    def __init__(
        self, watchers: Iterable[Any], namespace: str | None = None, delivery: str | None = None
    ) -> None:
        if delivery is not None:
            is_durable(delivery)
        self.watchers = list(normalize(watchers))
        self.namespace = namespace
        self.delivery = delivery

    def state_forwards(self, app_label: str, state: Any) -> None:
        """Models are left as they are."""

    def database_forwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Create what is missing."""
        if not self._allowed(app_label, schema_editor):
            return
        resolvers = _resolvers(to_state.apps)

        def change(cursor: Cursor) -> Change:
            durable = is_durable(self.delivery or default_delivery())
            namespace = self.namespace or default_namespace()
            found = define(cursor, self.watchers, resolvers, namespace, durable)
            return installing(cursor, namespace, [each.trigger for each in found], durable)

        self._apply(schema_editor, resolvers, to_state.apps, change)

    def database_backwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Remove them."""
        if not self._allowed(app_label, schema_editor):
            return
        resolvers = _resolvers(from_state.apps)

        def change(cursor: Cursor) -> Change:
            namespace = self.namespace or default_namespace()
            return removing(cursor, namespace, self.watchers, resolvers)

        self._apply(schema_editor, resolvers, from_state.apps, change)

    def describe(self) -> str:
        """What ``migrate`` and ``sqlmigrate`` print."""
        return f"Install watchers of {', '.join(map(str, self.watchers))}"

    @property
    def migration_name_fragment(self) -> str:
        """For a migration that is named by its operations."""
        return "install_watchers"

    def _allowed(self, app_label: str, schema_editor: Any) -> bool:
        """Whether the routers want this application's migrations in that database."""
        connection = schema_editor.connection
        return connection.vendor == "postgresql" and router.allow_migrate(
            connection.alias, app_label
        )

    def _apply(
        self, schema_editor: Any, resolvers: Sequence[Resolver], models: Any, change: Any
    ) -> None:
        connection = schema_editor.connection
        if not schema_editor.collect_sql:
            with _cursor(connection) as cursor:
                # Where the migration is not atomic, this is its whole transaction.
                savepoint = partial(transaction.atomic, connection.alias)
                with savepoint():
                    statements = change(cursor).forward
                run(cursor, statements, savepoint)
            return
        try:
            statements = self._foreseen(connection, resolvers, models, change)
        except (WatcherError, DatabaseError) as error:
            reason = " ".join(str(error).split())
            statements = (f"-- pgsignals reads the tables when the migration runs: {reason}",)
        for statement in statements:
            schema_editor.execute(statement, None)

    def _foreseen(
        self, connection: Any, resolvers: Sequence[Resolver], models: Any, change: Any
    ) -> tuple[str, ...]:
        """What would be run, with tables that earlier migrations have yet to create.

        Those are created for a moment, in a transaction that is rolled back, since only PostgreSQL
        knows the types of their columns.
        """
        with transaction.atomic(connection.alias), _cursor(connection) as cursor:
            try:
                with transaction.atomic(connection.alias):
                    found: Change = change(cursor)
            except TableError:
                wanted = {resolve(watcher.model, resolvers)[0].name for watcher in self.watchers}
                present = set(connection.introspection.table_names())
                with connection.schema_editor(atomic=False) as editor:
                    for model in models.get_models():
                        table = DjangoResolver().resolve(model)
                        if table is not None and table.name in wanted - present:
                            editor.create_model(model)
                    # Constraints to other tables, which may be missing too.
                    editor.deferred_sql.clear()
                found = change(cursor)
            transaction.set_rollback(True, connection.alias)
        return found.forward


class _HistoricalResolver(DjangoResolver):
    """Models by their names, as a migration knows them."""

    def __init__(self, models: Any) -> None:
        self._models = models

    def resolve(self, model: Any) -> TableRef | None:
        return super().resolve(self._historical(model))

    def _historical(self, model: Any) -> Any:
        if isinstance(model, str) and model.count(".") == 1:
            try:
                return self._models.get_model(model)
            except LookupError:
                return model
        return model


def _resolvers(models: Any) -> tuple[Resolver, ...]:
    return all_resolvers([_HistoricalResolver(models)])


@contextmanager
def _cursor(connection: Any) -> Iterator[Cursor]:
    def execute(statement: str) -> list[tuple[Any, ...]]:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    connection.ensure_connection()
    with borrowed_cursor(
        connection.connection, lambda: dsn_of(connection.alias), execute
    ) as cursor:
        yield cursor


class _WatcherSerializer(BaseSerializer):
    """Writes a watcher into a migration, as ``squashmigrations`` does."""

    def serialize(self) -> tuple[str, set[str]]:
        watcher: Watcher = self.value
        meta = getattr(watcher.model, "_meta", None)
        name = model_name(watcher.model) if meta is None else meta.label
        return source(watcher, name), {"import pgsignals"}


MigrationWriter.register_serializer(Watcher, _WatcherSerializer)
