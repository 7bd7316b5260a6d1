"""How things stand: what ``pgsignals status`` and ``Hub.status()`` tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from psycopg2.extensions import cursor as Cursor

from .broadcasters.outlet import BackendStatus
from .errors import ModelError, WatcherError
from .events import model_name
from .outbox.inspection import OutboxState
from .tables import Resolver, resolve
from .triggers.catalogue import Installed, read_installed
from .triggers.definitions import Definition, define
from .triggers.installer import MISSING, OUTDATED, State, judge, plan
from .watchers import Watcher

# The notification queue is there for bursts: from this share on, somebody holds it up.
QUEUE_WARNING = 0.1


@dataclass(frozen=True)
class Status:
    """A Hub and its database at one moment.

    ``queue_usage`` is the share, 0 to 1, of PostgreSQL's notification queue that is in use.
    ``depth`` counts events that wait for receivers, ``oldest`` is since when the first of them
    does, in seconds; the other numbers count since ``start``, ``shed`` what slow receivers lost.
    ``aside`` names the receivers that have queues of their own because they are slow, where an
    event counts once more.

    In outbox delivery and with a name at a broker, ``name`` is the consumer's, ``active`` whether
    this process reads for it rather than standing by, ``unacknowledged`` counts events that have
    been read and not been acknowledged, ``retrying`` calls that wait to be made again, and
    ``outbox`` is what is in the database.
    ``backends`` are the brokers that events are passed on to.
    """

    watchers: tuple[State, ...]
    namespace: str
    queue_usage: float
    running: bool = False
    connected: bool = False
    depth: int = 0
    oldest: float = 0.0
    received: int = 0
    invalid: int = 0
    shed: int = 0
    reconnects: int = 0
    aside: tuple[str, ...] = ()
    name: str | None = None
    active: bool = True
    unacknowledged: int = 0
    retrying: int = 0
    outbox: OutboxState | None = None
    backends: tuple[BackendStatus, ...] = ()


@dataclass(frozen=True)
class Health:
    """A Hub at one moment, told without asking the database.

    ``alive``: it was started, and the thread that listens goes on, if only to connect again; when
    not, only a new process helps. ``ready``: it is ``connected``, and receivers keep up, so that no
    event is being dropped; when not, ``reason`` says why. ``depth`` counts events that wait for
    receivers, ``oldest`` is since when the first of them does, ``lag`` the age of the latest that
    were handed to receivers, both in seconds. ``backends`` are the brokers that events are passed
    on to: one that is away makes nobody unready, since receivers get their events all the same.
    """

    alive: bool
    ready: bool
    connected: bool
    reason: str
    depth: int = 0
    oldest: float = 0.0
    lag: float = 0.0
    backends: tuple[BackendStatus, ...] = ()


def read_states(
    cursor: Cursor,
    watchers: Sequence[Watcher],
    resolvers: Sequence[Resolver],
    namespace: str,
    durable: bool = False,
) -> list[State]:
    """How the trigger of each watcher stands, and then the others of the namespace.

    Triggers that no watcher needs are INSTALLED when somebody listens to them and STALE when nobody
    does; without watchers that is how all are judged.
    """
    installed = read_installed(cursor, namespace)
    if not watchers:
        return [judge(item) for item in installed]
    definitions: list[Definition] = []
    broken: list[State] = []
    explained: set[str] = set()
    for watcher in watchers:
        try:
            definitions += define(cursor, [watcher], resolvers, namespace, durable)
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
    states = plan([definition.trigger for definition in definitions], installed).states
    return [state for state in states if state.name not in explained] + broken


def _former(
    watcher: Watcher, resolvers: Sequence[Resolver], installed: Sequence[Installed]
) -> dict[str, Installed]:
    """By operation, the triggers of a watcher that no longer fits its table."""
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


def read_queue_usage(cursor: Cursor) -> float:
    """The share, 0 to 1, of the server's notification queue that is in use."""
    cursor.execute("SELECT pg_catalog.pg_notification_queue_usage()")
    row = cursor.fetchone()
    return float(row[0]) if row is not None else 0.0
