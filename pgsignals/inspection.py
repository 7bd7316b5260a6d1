"""How things stand: what ``pgsignals status`` and ``Hub.status()`` tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2.extensions import cursor as Cursor

from .errors import WatcherError
from .events import model_name
from .tables import Resolver
from .triggers.catalogue import Installed, read_installed
from .triggers.definitions import Definition, define
from .triggers.installer import INSTALLED, MISSING, OUTDATED, STALE, State, plan
from .watchers import Watcher


@dataclass(frozen=True)
class Status:
    """A Hub and its database at one moment.

    ``queue_usage`` is the share, 0 to 1, of PostgreSQL's notification queue that is in use.
    ``depth`` counts events that wait for receivers; the other numbers count since ``start``.
    """

    watchers: tuple[State, ...]
    namespace: str
    queue_usage: float
    running: bool = False
    connected: bool = False
    depth: int = 0
    received: int = 0
    invalid: int = 0
    shed: int = 0
    reconnects: int = 0


def read_states(
    cursor: Cursor, watchers: Sequence[Watcher], resolvers: Sequence[Resolver], namespace: str
) -> list[State]:
    """How the trigger of each watcher stands, and the stale ones of the namespace.

    Without watchers it judges by the database alone: what somebody listens to is INSTALLED, what
    nobody listens to is STALE, and what misses a column is OUTDATED.
    """
    installed = read_installed(cursor, namespace)
    if not watchers:
        return [_judge(item) for item in installed]
    definitions: list[Definition] = []
    broken: list[State] = []
    explained: set[str] = set()
    for watcher in watchers:
        try:
            definitions += define(cursor, [watcher], resolvers, namespace)
        except WatcherError as error:
            for op in watcher.ops:
                former = [
                    item
                    for item in installed
                    if item.missing_columns
                    and (item.tag.op, item.tag.label) == (op, watcher.label)
                ]
                explained.update(item.name for item in former)
                broken.append(
                    State(
                        OUTDATED if former else MISSING,
                        former[0].schema if former else "",
                        former[0].table if former else model_name(watcher.model),
                        op,
                        watcher.label,
                        former[0].name if former else "",
                        former[0].listeners if former else 0,
                        str(error),
                    )
                )
    states = plan([definition.trigger for definition in definitions], installed).states
    return [state for state in states if state.name not in explained] + broken


def _judge(item: Installed) -> State:
    status, detail = (INSTALLED if item.listeners else STALE), ""
    if item.missing_columns:
        status, detail = OUTDATED, f"the table has no column {item.missing_columns[0]!r} any more"
    elif item.table is None:
        detail = "a function without its trigger"
    elif item.enabled == "D":
        status, detail = OUTDATED, "the trigger is disabled"
    return State(
        status, item.schema, item.table, item.tag.op, item.tag.label, item.name, item.listeners,
        detail,
    )


def read_queue_usage(cursor: Cursor) -> float:
    """The share, 0 to 1, of the server's notification queue that is in use."""
    cursor.execute("SELECT pg_catalog.pg_notification_queue_usage()")
    row = cursor.fetchone()
    return float(row[0]) if row is not None else 0.0
