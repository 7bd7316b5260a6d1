"""The states of installed triggers, and the tables whose messages were ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from psycopg2.extensions import cursor as Cursor

from ..core.errors import ModelError, WatcherError
from ..core.events import model_name
from ..core.tables import Resolver
from ..core.transport import Capture, Transport
from ..core.watchers import Watcher
from .catalogue import Installed, read_installed
from .definitions import Definition, define
from .installer import MISSING, OUTDATED, State, judge, plan
from .table_lookup import resolve


@dataclass(frozen=True)
class ForeignTable:
    """A table whose messages were ignored, since it is not, or no longer, the watched one.

    ``name`` is its name by now, with the schema; None if it has gone.
    """

    oid: int
    name: str | None
    messages: int


def read_states(
    cursor: Cursor,
    watchers: Sequence[Watcher],
    resolvers: Sequence[Resolver],
    namespace: str | None,
    transport: Transport = Transport.NOTIFY,
    capture: Capture | None = None,
) -> list[State]:
    """Return the states of each watcher's triggers, and then of the others of the namespace.

    Without a namespace, which is for no watchers, it returns the states of all.

    Triggers that no watcher needs are INSTALLED if somebody listens to them, and STALE if nobody
    does; without watchers all are judged like that.
    """
    installed = read_installed(cursor, namespace)
    if not watchers:
        return [judge(item) for item in installed]
    assert namespace is not None
    definitions: list[Definition] = []
    broken: list[State] = []
    explained: set[str] = set()
    for watcher in watchers:
        try:
            definitions += define(
                cursor, [watcher], resolvers, namespace, transport, capture=capture
            )
        except WatcherError as error:
            former = _former(watcher, resolvers, installed)
            for op in watcher.ops:
                item = former.get(op)
                if item is None:
                    name = model_name(watcher.model)
                    state = State(MISSING, "", name, op, watcher.label, "", 0, str(error))
                else:
                    explained.add(item.name)
                    state = replace(judge(item), status=OUTDATED, detail=str(error))
                broken.append(state)
    lacking = {definition.trigger.name: definition.lacking for definition in definitions}
    states = plan([definition.trigger for definition in definitions], installed).states
    return [
        replace(state, lacking=lacking.get(state.name, ""))
        for state in states
        if state.name not in explained
    ] + broken


def _former(
    watcher: Watcher, resolvers: Sequence[Resolver], installed: Sequence[Installed]
) -> dict[str, Installed]:
    """Return, by operation, the triggers of a watcher that no longer fits its table."""
    try:
        ref, _ = resolve(watcher.model, resolvers)
    except ModelError:
        return {}
    return {
        item.tag.op: item
        for item in installed
        if item.table == ref.name
        and ref.schema in (None, item.schema)
        and item.tag.label == watcher.label
    }


def read_foreign(cursor: Cursor, counts: Mapping[int, int]) -> tuple[ForeignTable, ...]:
    """Return the tables with these OIDs, with the counts of their ignored messages."""
    if not counts:
        return ()
    cursor.execute(
        "SELECT c.oid, n.nspname || '.' || c.relname FROM pg_catalog.pg_class c"
        " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY (%s::oid[])",
        (list(counts),),
    )
    named = dict(cursor.fetchall())
    return tuple(ForeignTable(oid, named.get(oid), counts[oid]) for oid in sorted(counts))
