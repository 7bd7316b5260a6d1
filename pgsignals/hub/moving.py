"""Lets a consumer that has read one log go on in another, when it is started with that delivery."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg2 import errors as pg
from psycopg2.extensions import cursor as Cursor

from ..consumers.channels import read_channels
from ..consumers.consumer_store import Channels, ConsumerStore
from ..consumers.log import DecoderHooks, Log, MessageDecoder, MovableLog
from ..consumers.slot_states import dropping
from ..core.errors import ConfigurationError, DatabaseError
from ..core.events import Event, Gap, Message
from ..core.logging import log
from ..core.payload import Cast, Decoder
from ..core.redaction import error_text
from ..core.transport import Capture, Transport
from ..outbox.log import OutboxLog
from ..postgres.connection import opened
from ..postgres.session import Session
from ..sources.handover import Handover
from ..sources.trigger_watch import TriggerWatch
from ..triggers import names
from ..triggers.definitions import Definition
from ..triggers.fingerprint import Fingerprint
from ..triggers.installer import Drift
from ..wal.log import WalLog
from .options import Options
from .setup import OutboxSetup, WalSetup


@dataclass(frozen=True)
class Reading:
    """The log that a consumer has its position in; ``capture`` is what served it there."""

    transport: Transport
    parts: int
    capture: Capture | None


def find_reading(cursor: Cursor, name: str) -> Reading | None:
    """Return what a consumer reads; None if there is no such consumer."""
    cursor.execute("SELECT pg_catalog.to_regclass('pgsignals.consumers') IS NOT NULL")
    if cursor.fetchall() == [(False,)]:
        return None
    cursor.execute(
        "SELECT lsn IS NOT NULL, parts, channels FROM pgsignals.consumers"
        " WHERE name = %s AND part = 0",
        (name,),
    )
    for logged, parts, channels in cursor.fetchall():
        if not logged:
            return Reading(Transport.OUTBOX, parts, None)
        known = read_channels(cursor)
        rows = any(known[each].layout.rows for each in channels if each in known)
        return Reading(Transport.WAL, parts, None if rows else "messages")
    return None


Former = Callable[[Transport, "Capture | None", str], "OutboxSetup | WalSetup"]


class MovingSetup:
    """The setup of one consumer with a name: that of its delivery or, at first, of its former one.

    ``setup`` is the delivery's, shared by all its consumers; ``former`` makes one for the log that
    a consumer comes from. While it comes, both have their triggers installed.
    """

    def __init__(
        self,
        options: Options,
        setup: OutboxSetup | WalSetup,
        former: Former,
        name: str,
        parts: int,
    ) -> None:
        self._options = options
        self._setup = setup
        self._make = former
        self._name = name
        self._parts = parts
        self._former: OutboxSetup | WalSetup | None = None
        # What the delivery needs, while the consumer comes from another log.
        self.coming: Sequence[Definition] = ()
        # Whether the consumer has come from another log, whose triggers may be left.
        self.moved = False

    @property
    def _present(self) -> OutboxSetup | WalSetup:
        return self._former or self._setup

    @property
    def missing(self) -> str:
        """See Preparer."""
        return self._present.missing

    def define(self, cursor: Cursor) -> Sequence[Definition]:
        """See Preparer."""
        found, ours = find_reading(cursor, self._name), self._setup.transport
        if found is None or found.transport is ours:
            self.moved, self._former = self.moved or self._former is not None, None
            self.coming = ()
            return self._setup.define(cursor)
        if max(found.parts, self._parts) > 1:
            raise ConfigurationError(
                f"The consumer {self._name!r} has delivery={found.transport.value!r} and "
                f"partitions={found.parts}, and this process was told delivery={ours.value!r} and "
                f"partitions={self._parts}: only a consumer of one partition can change its "
                "delivery under its name. Start the new delivery under a new name, and run "
                "`pgsignals consumers drop` when the former one has delivered what it had."
            )
        self.coming = self._setup.define(cursor)
        if self._former is None:
            log.info(
                "the consumer %s goes from delivery=%r to %r: what is left in the former comes "
                "first",
                self._name,
                found.transport.value,
                ours.value,
            )
            self._former = self._make(found.transport, found.capture, self._name)
        return self._former.define(cursor)

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """See Preparer."""
        if self._former is not None:
            self._setup.install(cursor, self.coming)
            if self._setup.missing:
                raise DatabaseError(
                    f"the consumer {self._name} cannot go to another delivery yet: "
                    f"{self._setup.missing}"
                )
        self._present.install(cursor, definitions)

    def drift(self, cursor: Cursor, listened: Sequence[Definition]) -> Drift | None:
        """See Triggers."""
        return self._present.drift(cursor, listened)

    def repair(self, cursor: Cursor, listened: Sequence[Definition]) -> str:
        """See Triggers."""
        return self._present.repair(cursor, listened)

    def log(self, session: Session, consumer: str, holder: str, timeout: float) -> MovableLog:
        """See LogProvider."""
        return self._present.log(session, consumer, holder, timeout)

    def decoder(self, hooks: DecoderHooks) -> MessageDecoder:
        """See LogProvider."""
        return _Decoders(lambda: self._present.decoder(hooks))

    def missing_grants(self, cursor: Cursor) -> list[str]:
        """See LogProvider."""
        former = [] if self._former is None else self._former.missing_grants(cursor)
        return [*dict.fromkeys([*former, *self._setup.missing_grants(cursor)])]

    def handover(self, former: Log, holder: str, timeout: float) -> Handover | None:
        """See DurablePreparer."""
        if self._former is None:
            self._tidy(former.consumer)
            return None
        assert isinstance(former, OutboxLog | WalLog)
        options, setup, wanted = self._options, self._setup, self.coming
        session = former.consumer.session
        watch = TriggerWatch(options.dsn, timeout, options.timing.statement, setup)

        def look() -> Fingerprint:
            _, at = former.surroundings()
            return watch.begin(session, wanted, at, "")

        def check() -> None:
            with opened(options.dsn, timeout, options.timing.statement) as cursor:
                if (drift := setup.drift(cursor, wanted)) is not None:
                    raise DatabaseError(drift.reason)

        return Handover(
            former,
            setup.log(session, self._name, holder, timeout),
            look,
            check,
            sorted({names.channel_key(each.trigger.hash) for each in wanted}),
        )

    def _tidy(self, consumer: ConsumerStore) -> None:
        """Remove what a change of the delivery has left that a crash interrupted."""
        if self._setup.transport is Transport.WAL:
            consumer.execute(
                "UPDATE pgsignals.consumers SET snapshot = NULL, floor = NULL"
                " WHERE name = %s AND snapshot IS NOT NULL AND lsn IS NOT NULL",
                (self._name,),
            )
            return
        [(database,)] = consumer.execute("SELECT pg_catalog.current_database()")
        slot = names.slot_name(database, self._name)
        try:
            consumer.execute(
                "SELECT pg_catalog.pg_drop_replication_slot(slot_name)"
                " FROM pg_catalog.pg_replication_slots"
                " WHERE slot_name = %s AND NOT active AND database = %s",
                (slot, database),
            )
        except (pg.InsufficientPrivilege, pg.ObjectInUse, pg.UndefinedObject) as error:
            log.warning(
                "the replication slot of %s, who reads the outbox, is left: run %s (%s)",
                self._name,
                dropping(slot),
                error_text(error),
            )


class _Decoders:
    """Decodes the messages of one log and then of another: see MessageDecoder."""

    def __init__(self, make: Callable[[], MessageDecoder]) -> None:
        self._make = make
        self._present = make()

    @property
    def channels(self) -> Channels:
        return self._present.channels

    def begin(self, log: Log, definitions: Sequence[Definition], cast: Cast) -> None:
        self._present = self._make()
        self._present.begin(log, definitions, cast)

    def describe(self) -> None:
        self._present.describe()

    def predecessors(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        return self._present.predecessors()

    def decoders(self) -> dict[int, Decoder]:
        return self._present.decoders()

    def channel_of(self, event: Event) -> int:
        return self._present.channel_of(event)

    def decode(self, found: Sequence[Any], since: datetime) -> Iterator[Message | Gap]:
        return self._present.decode(found, since)
