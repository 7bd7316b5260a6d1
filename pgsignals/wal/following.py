"""The write-ahead log as streams to browsers follow it: from a little before the present on.

A slot of the streams' own, one for each database, keeps the log for a while. Each process reads
through a temporary copy of it, and so finds what was committed before it began, or while its
connection was lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from psycopg2.extensions import cursor as Cursor

from ..core.errors import DatabaseError
from ..core.events import Event, Gap, Message
from ..core.logging import log
from ..core.lsn import lsn_text
from . import slots
from .decoding import WalDecoder
from .log import READ_ONCE, WalLog
from .places import Place
from .reader import Entry, Run, WalPosition
from .stream import PublicationMissing

# The streams' slot stays at most so far behind the present. The first stream of a process waits
# until that has been read.
MOST_BYTES = 256 << 20
# How long making the slot may wait for transactions, in a thread that has other things to do.
SLOT_SECONDS = 5.0

_PRESENT = "SELECT (pg_catalog.pg_current_wal_insert_lsn() - '0/0'::pg_catalog.pg_lsn)::int8"


class FollowedLog(WalLog):
    """The log from where the streams' slot ``shared`` begins; without a name, from now on."""

    shared = ""
    #: Everything that committed from here on comes.
    begin = 0

    def _prepare_slot(self) -> None:
        if self.shared:
            self._keep_shared()
        self._start_stream(0, self.shared)

    def _keep_shared(self) -> None:
        slot = slots.look(self._execute, self.shared)
        if slot is not None:
            why = slot.invalidation
            if not why and slot.confirmed is not None:
                behind = self.present() - slot.confirmed
                why = f"it is {behind} bytes behind" if behind > 2 * MOST_BYTES else ""
            if why and slot.active_pid is None:
                log.warning(
                    "making the replication slot %s anew (%s): browsers that were away get a gap",
                    self.shared,
                    why,
                )
                slots.drop(self._execute, self.shared)
        # A promotion makes tokens void: a standby need not have the slot, nor be waited for.
        self._make_slot(self.shared, failover=False)

    def present(self) -> int:
        """How far the log has come."""
        [(lsn,)] = self._execute(_PRESENT)
        return int(lsn)

    def _begin_at(self, position: WalPosition) -> tuple[int, str]:
        slot = slots.look(self._execute, self._slot)
        if slot is None or slot.confirmed is None:
            raise DatabaseError(READ_ONCE)
        self.begin = slot.confirmed
        lost = ""
        if slot.confirmed > position.lsn:
            lost = (
                f"the log is kept for streams from {lsn_text(slot.confirmed)} on, and "
                f"{lsn_text(position.lsn)} had been read"
            )
        return slot.confirmed, lost

    def _give_up_slot(self, error: PublicationMissing) -> None:
        super()._give_up_slot(error)
        if self.shared:
            log.error("dropping the replication slot %s, which is stuck: %s", self.shared, error)
            slots.drop(self._execute, self.shared)


class PlacedDecoder(WalDecoder):
    """Tells where in the log each message stands, and each Gap, whoever reads and in what pages."""

    #: The place of the Gap that is being given.
    place: Place | None = None

    def decode(self, found: Sequence[Entry], since: datetime) -> Iterator[Message | Gap]:
        # By the identity of messages that are alive until the page has been placed.
        self._starts: dict[int, tuple[int, int, bool]] = {}
        for entry in found:
            if isinstance(entry, Run):
                yield from self._place_run(entry)
                continue
            for each in super().decode([entry], since):
                if isinstance(each, Gap):
                    self.place = Place(entry.id, entry.number)
                else:
                    self._starts[id(each)] = entry.id, entry.number, False
                yield each
        self.place = None

    def _place_run(self, run: Run) -> Iterator[Message | Gap]:
        messages = list(self.decode_run(run))
        broken = any(isinstance(each, Gap) for each in messages)
        if broken and len(run.data) > 1:
            # Where a run begins and ends depends on the pages: a Gap belongs to its change.
            for single in run.singly():
                yield from self._place_run(single)
            return
        for each in messages:
            if isinstance(each, Gap):
                self.place = Place(run.id, run.first)
            else:
                self._starts[id(each)] = run.id, each.first, True
            yield each

    def place_of(self, event: Event) -> Place:
        """Return the place of an event of the page that was decoded last."""
        message, number = event._message, event._number
        lsn, change, by_rows = self._starts[id(message)]
        topic = message.topic.name
        return (
            Place(lsn, change + number, 0, topic) if by_rows else Place(lsn, change, number, topic)
        )


def keep_near(cursor: Cursor, name: str, target: int | None) -> None:
    """Let go of what the streams' slot keeps below ``target``, and beyond what it may keep.

    Make it anew if it is gone or of no use. Without a target nobody of this process streams: give
    the slot up if it is far behind, since nobody else seems to move it on.
    """

    def execute(statement: str, parameters: Sequence[object]) -> list[tuple[object, ...]]:
        cursor.execute(statement, parameters)
        return cursor.fetchall()

    cursor.execute(_PRESENT)
    [(present,)] = cursor.fetchall()
    slot = slots.look(execute, name)
    usable = slot is not None and not slot.invalidation
    if target is None:
        if slot is not None and slot.active_pid is None:
            behind = present - (slot.confirmed or 0)
            if not usable or behind > 4 * MOST_BYTES:
                log.info("dropping the replication slot %s, which nobody streams through", name)
                slots.drop(execute, name)
        return
    if slot is None or not usable:
        log.warning("the replication slot %s is gone, and made anew", name)
        if slot is not None:
            slots.drop(execute, name)
        version = cursor.connection.server_version
        slots.create(execute, name, version, SLOT_SECONDS, failover=False)
        return
    wanted = min(max(target, present - MOST_BYTES), present)
    # The server reads the log from the slot's restart on each time: not for every little step, as
    # each of several processes would take it.
    if slot.confirmed is not None and wanted - slot.confirmed > (present - wanted) // 10:
        slots.advance(execute, name, wanted)
