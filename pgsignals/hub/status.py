"""How things stand: what ``pgsignals status`` and ``Hub.status()`` tell."""

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
    ``depth`` counts events that wait for receivers, ``oldest`` is since when the first of them
    does, in seconds; the other numbers count since ``start``, ``shed`` what slow receivers lost.
    ``aside`` names the receivers that have queues of their own because they are slow, where an
    event counts once more; in outbox delivery also those for which events are parked in the
    database, which ``outbox.parked`` counts.

    In outbox delivery and with a name at a broker, ``name`` is the consumer's, ``active`` whether
    this process reads for it rather than standing by, ``unacknowledged`` counts events that have
    been read and not been acknowledged, ``retrying`` calls that wait to be made again, and
    ``outbox`` is what is in the database.
    ``backends`` are the brokers that events are passed on to. ``foreign`` are tables with a trigger
    of a watched one, which had that one's name before, say, and whose rows are nobody's.
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
    """A Hub at one moment, told without asking the database.

    ``alive``: it was started, and its threads go on, the one that listens if only to connect again;
    when not, only a new process helps. ``ready``: it is ``connected``, and receivers keep up, so
    that no event is being dropped; when not, ``reason`` says why. ``depth`` counts events that wait
    for receivers, ``oldest`` is since when the first of them does, ``lag`` the age of the latest
    that were handed to receivers, both in seconds. ``backends`` are the brokers that events are
    passed on to: one that is away makes nobody unready, since receivers get their events all the
    same. Nor does a receiver that is set ``aside`` as long as it loses nothing, as in Status.
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
