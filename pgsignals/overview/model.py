"""The state of one database's signals as plain values, which ``top`` and the console show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

from ..consumers.backfills.requests import BackfillState
from ..consumers.parking_store import ParkedState
from ..consumers.slot_states import SlotState
from ..core.transport import Capture, Delivery
from .checks.findings import Finding

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class WatcherState:
    """A trigger of ours, or rows of the write-ahead log that serve a watcher, in any namespace.

    ``status`` is INSTALLED while somebody listens or a consumer reads, STALE if nobody does, and
    OUTDATED if something keeps it from its work; ``detail`` says what. ``served`` is set in WAL
    delivery. ``columns`` are those that it reads, ``condition`` its ``when``, if it can be told.
    ``listeners`` counts sessions, ``consumers`` are the named ones that read it. ``twins`` are the
    names of others that do the same on the table.
    """

    name: str
    namespace: str
    delivery: Delivery
    served: Capture | None
    schema: str
    table: str | None
    op: str
    label: str | None
    columns: tuple[str, ...]
    condition: str
    owner: str
    status: str
    detail: str
    listeners: int
    consumers: tuple[str, ...]
    twins: tuple[str, ...]


@dataclass(frozen=True)
class ConsumerState:
    """One partition of a consumer, or of a backend, which is a consumer of its own.

    ``host`` and ``pid`` are those of the process that reads it, or that read it last. ``lag`` is
    in events (None in the write-ahead log, where nobody knows), ``lag_bytes`` is what it has yet to
    read, and ``lag_seconds`` the age of the oldest event that it has not acknowledged. ``counted``
    is false where there are more events than were counted. ``reason`` says what holds it up.
    """

    name: str
    part: int
    parts: int
    kind: str
    ephemeral: bool
    active: bool
    host: str
    pid: int | None
    delivery: Delivery
    lag: int | None
    counted: bool
    lag_bytes: int
    lag_seconds: float
    acknowledged: int
    acknowledged_at: datetime
    dead_letters: int
    slot: SlotState | None
    reason: str

    @property
    def key(self) -> str:
        """The consumer's name, with the number of the partition if there are several."""
        return self.name if self.parts == 1 else f"{self.name} {self.part + 1}/{self.parts}"


@dataclass(frozen=True)
class Letter:
    """A dead letter without its values; ``retrying`` from a request until its receiver is called.

    ``table`` is empty, and ``record`` too, where the message's description is gone.
    """

    id: int
    consumer: str
    receiver: str
    table: str
    op: str
    record: str
    error: str
    attempts: int
    at: datetime
    retrying: bool


@dataclass(frozen=True)
class LetterDetail(Letter):
    """A dead letter with its traceback; ``values`` is empty unless values may be shown."""

    uid: str
    traceback: str
    values: str


@dataclass(frozen=True)
class Letters:
    """The count of dead letters, by consumer, and the latest of them."""

    total: int = 0
    consumers: Mapping[str, int] = field(default_factory=dict)
    latest: tuple[Letter, ...] = ()


@dataclass(frozen=True)
class OutboxSize:
    """The bytes of the outbox, and how many statements found it full while no consumer lived."""

    bytes: int
    shed: int


@dataclass(frozen=True)
class Overview:
    """The state of one database's signals at a moment.

    ``problem`` says why it could not be read, or what this role may not read. ``rates`` are events
    a second by the name of the watcher; a watcher of which nobody can tell has none.
    """

    at: datetime
    database: str = ""
    host: str = ""
    user: str = ""
    server: str = ""
    connected: bool = False
    problem: str = ""
    queue_usage: float = 0.0
    outbox: OutboxSize | None = None
    watchers: tuple[WatcherState, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    consumers: tuple[ConsumerState, ...] = ()
    parked: tuple[ParkedState, ...] = ()
    slots: tuple[SlotState, ...] = ()
    dead_letters: Letters = Letters()
    backfills: tuple[BackfillState, ...] = ()
    findings: tuple[Finding, ...] = ()
    findings_at: datetime = _EPOCH
