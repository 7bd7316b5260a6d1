"""Alembic: ``op.install_watchers`` and ``op.uninstall_watchers``, and autogenerate for them.

Import this module in ``env.py`` to register them. Give the watchers to ``context.configure`` there;
by them, autogenerate and ``alembic check`` tell what the database lacks::

    context.configure(
        …,
        pgsignals_watchers=WATCHERS,
        pgsignals_namespace="default",
        pgsignals_delivery="outbox",
    )
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from psycopg2.extensions import cursor as Cursor

from ..core.errors import ConfigurationError, MissingExtraError, TableError
from ..core.events import model_name
from ..core.tables import Resolver
from ..core.transport import Capture, Transport
from ..core.watchers import Watcher, normalize
from ..hub.options import all_resolvers
from ..postgres.dsn import dsn_of
from ..postgres.home_check import is_home
from ..triggers.definitions import define
from ..triggers.table_lookup import resolve
from .migrations import (
    Change,
    Planning,
    Wanted,
    borrowed_cursor,
    creating,
    pruning,
    run,
    source,
    sqlstates,
)

try:
    from alembic.autogenerate import comparators, renderers
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations import MigrateOperation, Operations
    from alembic.operations.ops import UpgradeOps
    from sqlalchemy import Connection
except ImportError as error:
    raise MissingExtraError(
        "pgsignals.contrib.alembic needs Alembic: pip install 'pgsignals[alembic]'"
    ) from error

log = logging.getLogger("pgsignals")

_UNDEFINED_COLUMN = "42703"


class _WatchersOp(MigrateOperation):
    """The part of both operations: watchers, or statements that autogenerate has foreseen."""

    name = ""
    planning: Planning

    def __init__(
        self,
        watchers: Sequence[Watcher] = (),
        namespace: str | None = None,
        change: Change | None = None,
        delivery: str | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.watchers = tuple(watchers)
        self.namespace = namespace
        self.change = change or Change()
        self.delivery = delivery
        self.capture = capture

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` prints."""
        lines = (*self.change.lasting, *self.change.summary)
        return (self.name, *(lines or map(str, self.watchers)))

    def reverse(self) -> MigrateOperation:
        """Return the opposite operation, for the downgrade."""
        installs = isinstance(self, InstallWatchersOp)
        opposite = UninstallWatchersOp if installs else InstallWatchersOp
        # Without the delivery, since triggers of any are removed.
        return opposite(self.watchers, self.namespace, self.change.reversed())


@Operations.register_operation("install_watchers")
class InstallWatchersOp(_WatchersOp):
    """The operation ``op.install_watchers``."""

    name = "install_watchers"
    planning = staticmethod(Wanted.installing)

    @classmethod
    def install_watchers(
        cls,
        operations: Operations,
        watchers: Iterable[Any] = (),
        *,
        namespace: str | None = None,
        delivery: str | None = None,
        capture: Capture | None = None,
        statements: Sequence[str] = (),
    ) -> None:
        """Install those triggers of watchers that are missing or outdated.

        ``watchers`` are what :func:`pgsignals.start` takes; tables by their names stay right when
        the models change. ``namespace``, ``delivery`` and ``capture`` are those of ``start``, and
        by default what ``context.configure`` got as ``pgsignals_namespace`` and so on, or else
        ``"default"``, ``"notify"`` and None; for a durable delivery the schema ``pgsignals`` is
        made or upgraded, too, and for ``"wal"`` the publications. ``statements``, as autogenerate
        writes them, are run as they are instead; ``--sql`` takes them alone.

        Raises ConfigurationError for watchers with ``--sql``, which cannot read the tables, and for
        an unknown delivery; InstallLockError for a table that somebody else holds locked.
        """
        change = Change(tuple(statements))
        operations.invoke(cls(normalize(watchers), namespace, change, delivery, capture))


@Operations.register_operation("uninstall_watchers")
class UninstallWatchersOp(_WatchersOp):
    """The operation ``op.uninstall_watchers``."""

    name = "uninstall_watchers"
    planning = staticmethod(Wanted.removing)

    @classmethod
    def uninstall_watchers(
        cls,
        operations: Operations,
        watchers: Iterable[Any] = (),
        *,
        namespace: str | None = None,
        statements: Sequence[str] = (),
    ) -> None:
        """Remove the triggers of watchers, of any delivery, except those that somebody needs.

        Somebody listens to such a trigger now, or a named consumer reads its messages. The schema
        itself stays. The parameters are those of ``op.install_watchers``.
        """
        operations.invoke(cls(normalize(watchers), namespace, Change(tuple(statements))))


def _delivery(options: Any) -> str:
    return str(options.get("pgsignals_delivery") or "notify")


def _capture(options: Any) -> Capture | None:
    found: Capture | None = options.get("pgsignals_capture")
    return found


def _namespace(options: Any) -> str:
    return str(options.get("pgsignals_namespace") or "default")


@Operations.implementation_for(InstallWatchersOp)
@Operations.implementation_for(UninstallWatchersOp)
def _apply(operations: Operations, operation: _WatchersOp) -> None:
    context = operations.get_context()
    transport = Transport(operation.delivery or _delivery(context.opts))
    namespace = operation.namespace or _namespace(context.opts)
    watchers, statements = operation.watchers, operation.change.forward
    if context.as_sql:
        if watchers:
            raise ConfigurationError(
                f"op.{operation.name} of {', '.join(map(str, watchers))} reads the "
                "tables, which --sql cannot: upgrade a database that can be reached, or let "
                "`alembic revision --autogenerate` write the statements once the tables are there."
            )
        for statement in statements:
            # Not through text(), which would take colons for parameters.
            context.impl.static_output(statement + context.impl.command_terminator)
        return
    connection = operations.get_bind()
    with _cursor(connection) as cursor:
        if watchers:
            capture = operation.capture or _capture(context.opts)
            wanted = Wanted(watchers, all_resolvers(()), namespace, transport, capture)
            statements = (*statements, *operation.planning(wanted, cursor).forward)
        run(cursor, statements, connection.begin_nested)


def _cursor(connection: Connection) -> AbstractContextManager[Cursor]:
    def execute(statement: str) -> list[tuple[Any, ...]]:
        result = connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
        return [tuple(row) for row in result] if result.returns_rows else []

    driver = connection.connection.driver_connection
    return borrowed_cursor(driver, lambda: dsn_of(connection.engine), execute)


def _compare(
    autogen_context: AutogenContext, upgrade_ops: UpgradeOps, schemas: Iterable[str | None]
) -> None:
    """Add operations that install missing triggers, and remove those that nobody needs any more.

    The watchers are those given to ``context.configure``.
    Triggers are removed before tables change and made after, so that the downgrade, which goes the
    other way round, finds the tables that it needs.
    """
    given = autogen_context.opts.get("pgsignals_watchers")
    connection = autogen_context.connection
    if given is None or connection is None:
        return
    namespace = _namespace(autogen_context.opts)
    delivery = _delivery(autogen_context.opts)
    transport, capture = Transport(delivery), _capture(autogen_context.opts)
    resolvers = all_resolvers(())
    triggers = []
    later: list[Watcher] = []
    with _cursor(connection) as cursor:
        for watcher in normalize(given):
            home = resolve(watcher.model, resolvers)[0].home
            if home is not None and not is_home(cursor, home):
                log.info("%s is of %s, and left to the migrations of that", watcher, home.name)
                continue
            try:
                # In a savepoint, since an undefined column would abort the whole transaction.
                with connection.begin_nested():
                    found = define(
                        cursor, [watcher], resolvers, namespace, transport, capture=capture
                    )
            except Exception as error:
                if not _of_this_revision(error):
                    raise
                later.append(_by_name(watcher, resolvers))
            else:
                triggers += [definition.trigger for definition in found]
        removed = pruning(cursor, namespace, triggers)
        created = creating(cursor, namespace, triggers, transport)
    if removed.summary:
        upgrade_ops.ops.insert(0, UninstallWatchersOp((), namespace, removed))
    if created.summary or created.lasting:
        upgrade_ops.ops.append(InstallWatchersOp((), namespace, created))
    if later:
        upgrade_ops.ops.append(InstallWatchersOp(later, namespace, None, delivery, capture))


try:
    from alembic.util import DispatchPriority
except ImportError:  # Before Alembic 1.18, comparators ran in the order of their registration.
    comparators.dispatch_for("schema")(_compare)
else:
    comparators.dispatch_for("schema", priority=DispatchPriority.LAST)(_compare)


def _of_this_revision(error: BaseException | None) -> bool:
    """Whether a watcher lacks a table or a column, which this revision may be about to create."""
    return isinstance(error, TableError) or _UNDEFINED_COLUMN in sqlstates(error)


def _by_name(watcher: Watcher, resolvers: Sequence[Resolver]) -> Watcher:
    """Return the watcher with table and columns by name, for a migration that outlives models."""
    ref, _ = resolve(watcher.model, resolvers)
    if ref.only is not None:
        raise ConfigurationError(
            f"{model_name(watcher.model)} shares its table, which is not there yet: upgrade to a "
            "revision that creates it, and autogenerate the watchers after that."
        )
    return replace(
        watcher,
        model=".".join(_quoted(part) for part in (ref.schema, ref.name) if part is not None),
        columns=tuple(ref.attributes.get(name, name) for name in watcher.columns),
        extra=tuple(ref.attributes.get(name, name) for name in watcher.extra),
    )


def _quoted(name: str) -> str:
    if '"' in name or "." in name:
        return '"' + name.replace('"', '""') + '"'
    return name


@renderers.dispatch_for(InstallWatchersOp)
@renderers.dispatch_for(UninstallWatchersOp)
def _render(autogen_context: AutogenContext, operation: _WatchersOp) -> str:
    if not operation.watchers and not operation.change.forward:
        # The way back from a revision that does no more than make the outbox.
        return "pass  # the schema pgsignals stays"
    lines = [f"op.{operation.name}("]
    if operation.watchers:
        autogen_context.imports.add("import pgsignals")
        lines.append("    [")
        lines += [f"        {source(each, model_name(each.model))}," for each in operation.watchers]
        lines.append("    ],")
    if operation.namespace not in (None, "default"):
        lines.append(f"    namespace={operation.namespace!r},")
    if operation.watchers and operation.delivery not in (None, "notify"):
        lines.append(f"    delivery={operation.delivery!r},")
    if operation.watchers and operation.capture is not None:
        lines.append(f"    capture={operation.capture!r},")
    if operation.change.forward:
        change = operation.change
        lines += [f"    # {line}" for line in (*change.lasting, *change.summary)]
        lines.append("    statements=[")
        lines += [f"        {_literal(statement)}," for statement in operation.change.forward]
        lines.append("    ],")
    return "\n".join([*lines, ")"])


def _literal(text: str) -> str:
    """Return a literal for each line: templates and formatters would move the lines within one."""
    lines = [repr(line) for line in text.splitlines(keepends=True)]
    return lines[0] if len(lines) == 1 else "\n            ".join(["(", *lines]) + "\n        )"
