"""The operation ``InstallWatchers`` for migrations."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from django.db import DatabaseError, router, transaction
from django.db.migrations.operations.base import Operation
from django.db.migrations.serializer import BaseSerializer
from django.db.migrations.writer import MigrationWriter
from psycopg2.extensions import cursor as Cursor

from ...core.errors import TableError, WatcherError
from ...core.events import model_name
from ...core.tables import TableRef
from ...core.transport import Capture, Transport
from ...core.watchers import Watcher, normalize
from ...hub.options import all_resolvers
from ...triggers.resolvers.django import DjangoResolver, is_model
from ...triggers.table_lookup import resolve
from ..migrations import Planning, Wanted, borrowed_cursor, run, source
from .conf import default_capture, default_delivery, default_namespace, dsn_of


class InstallWatchers(Operation):
    """Install the triggers of watchers; backwards, remove them.

    ``watchers`` are what :func:`pgsignals.start` takes, with models as ``"app_label.Model"``, whose
    columns go by their fields' names as they are at this point of the migrations, or tables by
    their names; a model that the routers do not let migrate into a database is left out there, as
    its table is. ``namespace``, ``delivery`` and ``capture`` are by default those of PGSIGNALS when
    the migration runs; for durable deliveries the schema ``pgsignals`` is made or upgraded, too,
    and for ``"wal"`` the publications.

    A trigger that is as it should be is left alone. Backwards, one that somebody listens to or that
    a named consumer reads is left, with a warning of PostgreSQL's, and the schema stays. A
    table that is locked by somebody else for more than half a second makes the migration fail with
    InstallLockError, and nothing is changed: run the migration again.
    """

    reduces_to_sql = True
    reversible = True

    def __init__(
        self,
        watchers: Iterable[Any],
        namespace: str | None = None,
        delivery: str | None = None,
        capture: Capture | None = None,
    ) -> None:
        if delivery is not None:
            Transport(delivery)
        self.watchers = list(normalize(watchers))
        self.namespace = namespace
        self.delivery = delivery
        self.capture = capture

    def state_forwards(self, app_label: str, state: Any) -> None:
        """Leave the models as they are."""

    def database_forwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Create the triggers that are missing."""
        self._run(app_label, schema_editor, to_state.apps, Wanted.installing)

    def database_backwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Remove the triggers."""
        self._run(app_label, schema_editor, from_state.apps, Wanted.removing)

    def describe(self) -> str:
        """Return what ``migrate`` and ``sqlmigrate`` print."""
        return f"Install watchers of {', '.join(map(str, self.watchers))}"

    @property
    def migration_name_fragment(self) -> str:
        """The operation's part of the name of a migration that is named by its operations."""
        return "install_watchers"

    def _watchers(self, app_label: str, schema_editor: Any, models: Any) -> list[Watcher]:
        """Return the watchers of tables that the routers want in that database.

        A table given by its name is taken for one of the application whose migration this is.
        """
        alias, historical = schema_editor.connection.alias, _HistoricalResolver(models).historical
        if schema_editor.connection.vendor != "postgresql":
            return []
        return [
            watcher
            for watcher in self.watchers
            if (
                router.allow_migrate_model(alias, model)
                if is_model(model := historical(watcher.model))
                else router.allow_migrate(alias, app_label)
            )
        ]

    def _run(self, app_label: str, schema_editor: Any, models: Any, planning: Planning) -> None:
        connection = schema_editor.connection
        watchers = self._watchers(app_label, schema_editor, models)
        if not watchers:
            return
        resolvers = all_resolvers([_HistoricalResolver(models)])
        namespace = self.namespace or default_namespace(connection.alias)
        transport = Transport(self.delivery or default_delivery(connection.alias))
        capture = self.capture or default_capture(connection.alias)
        wanted = Wanted(watchers, resolvers, namespace, transport, capture)
        if not schema_editor.collect_sql:
            with _cursor(connection) as cursor:
                # If the migration is not atomic, this is its whole transaction.
                savepoint = partial(transaction.atomic, connection.alias)
                with savepoint():
                    statements = planning(wanted, cursor).forward
                run(cursor, statements, savepoint)
            return
        try:
            statements = self._foreseen(connection, models, wanted, planning)
        except (WatcherError, DatabaseError) as error:
            reason = " ".join(str(error).split())
            statements = (f"-- pgsignals reads the tables when the migration runs: {reason}",)
        for statement in statements:
            schema_editor.execute(statement, None)

    def _foreseen(
        self, connection: Any, models: Any, wanted: Wanted, planning: Planning
    ) -> tuple[str, ...]:
        """Return the statements to run, with tables that earlier migrations have yet to create.

        Such tables are created for a moment, in a transaction that is rolled back, since only
        PostgreSQL knows the types of their columns.
        """
        with transaction.atomic(connection.alias), _cursor(connection) as cursor:
            try:
                with transaction.atomic(connection.alias):
                    found = planning(wanted, cursor)
            except TableError:
                names = {resolve(each.model, wanted.resolvers)[0].name for each in self.watchers}
                present = set(connection.introspection.table_names())
                with connection.schema_editor(atomic=False) as editor:
                    for model in models.get_models():
                        table = DjangoResolver(routed=False).resolve(model)
                        if table is not None and table.name in names - present:
                            editor.create_model(model)
                    # Without constraints to other tables, which may be missing, too.
                    editor.deferred_sql.clear()
                found = planning(wanted, cursor)
            transaction.set_rollback(True, connection.alias)
        return found.forward


class _HistoricalResolver(DjangoResolver):
    """Resolves models by their names, as a migration knows them."""

    def __init__(self, models: Any) -> None:
        # Routers say by allow_migrate in which database tables, and so their triggers, are made.
        super().__init__(routed=False)
        self._models = models

    def resolve(self, model: Any) -> TableRef | None:
        return super().resolve(self.historical(model))

    def historical(self, model: Any) -> Any:
        """Return the model that a text names; anything else as it is."""
        if isinstance(model, str) and model.count(".") == 1:
            try:
                return self._models.get_model(model)
            except LookupError:
                return model
        return model


def _cursor(connection: Any) -> AbstractContextManager[Cursor]:
    def execute(statement: str) -> list[tuple[Any, ...]]:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    connection.ensure_connection()
    return borrowed_cursor(connection.connection, lambda: dsn_of(connection.alias), execute)


class _WatcherSerializer(BaseSerializer):
    """Writes a watcher into a migration, as ``squashmigrations`` does."""

    def serialize(self) -> tuple[str, set[str]]:
        watcher: Watcher = self.value
        meta = getattr(watcher.model, "_meta", None)
        name = model_name(watcher.model) if meta is None else meta.label
        return source(watcher, name), {"import pgsignals"}


MigrationWriter.register_serializer(Watcher, _WatcherSerializer)
