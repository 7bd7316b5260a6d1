"""The results of ``Hub.status()`` and ``Hub.health()``, and of ``pgsignals status``."""

from __future__ import annotations

from dataclasses import dataclass

from ..dispatch.backend_status import BackendStatus
from ..outbox.inspection import OutboxState
from ..triggers.inspection import ForeignTable
from ..triggers.installer import State


@dataclass(frozen=True)
class Status:
    """A Hub and its database at one moment.

    ``queue_usage`` is the share, 0 to 1, of PostgreSQL's notification queue that is in use.
    ``depth`` counts events that wait for receivers, and ``oldest`` is for how many seconds the
    first of them has waited. The other numbers count since ``start``; ``shed`` counts events that
    slow receivers lost. ``aside`` names the receivers that have queues of their own because they
    are slow, where an event counts once more; in durable delivery also those for which events are
    parked in the database, which ``outbox.parked`` counts.

    In durable delivery and with a name at a broker, ``name`` is the consumer's, ``active`` whether
    this process reads for it rather than standing by, ``unacknowledged`` counts events that have
    been read and not been acknowledged, ``retrying`` calls that wait to be made again, and
    ``outbox`` is the state of the outbox in the database.
    ``backends`` are the brokers that events are forwarded to. ``foreign`` are tables that have a
    watched table's trigger but are not watched (one that had its name before, say), whose events
    are ignored.
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
    foreign: tuple[ForeignTable, ...] = ()


@dataclass(frozen=True)
class Health:
    """A Hub at one moment, without asking the database.

    ``alive``: it was started, and its threads go on, if only to connect again; if it is not, only a
    new process helps. ``ready``: it is ``connected``, and receivers keep up, so that no event is
    being dropped; if it is not, ``reason`` says why. ``depth`` counts events that wait for
    receivers, ``oldest`` is for how long the first of them has waited, and ``lag`` the age of the
    latest event when it was handed to receivers, both in seconds. ``backends`` are the brokers that
    events are forwarded to: a Hub stays ready while one is away, since receivers get their events
    all the same. It also stays ready while a receiver is set ``aside``, as in Status, and loses
    nothing.
    """

    alive: bool
    ready: bool
    connected: bool
    reason: str
    depth: int = 0
    oldest: float = 0.0
    lag: float = 0.0
    aside: tuple[str, ...] = ()
    backends: tuple[BackendStatus, ...] = ()
