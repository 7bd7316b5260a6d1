"""Wrong ways to read a log and to trust in triggers, which the checker must find out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pgsignals.consumers import claims
from pgsignals.dispatch import forwarder, in_flight
from pgsignals.outbox import cursors, log, reader
from pgsignals.outbox.cursors import Window
from pgsignals.outbox.log import Look, OutboxLog
from pgsignals.outbox.reader import Cursor, Row, WindowReader
from pgsignals.postgres.snapshot import Snapshot
from pgsignals.sources.trigger_history import Installation
from pgsignals.sources.trigger_watch import TriggerWatch
from pgsignals.triggers.fingerprint import Fingerprint
from pgsignals.wal.log import WalLog
from pgsignals.wal.reader import WalPosition, WalReader
from pgsignals.wal.stream import ReplicationStream

_WINDOW = "txid < $4 AND (txid >= $2 OR txid = ANY ($3)) AND txid <> ALL ($5)"
_NO_WINDOW = "$2 + $4 > 0 AND ($3 || $5) IS NOT NULL"


def _read_with(former: str, wrong: str) -> None:
    statement = log.read_statement

    def wrong_statement(name: str, rows: int, size: int) -> str:
        right = statement(name, rows, size)
        assert former in right, right
        return right.replace(former, wrong)

    log.read_statement = wrong_statement


class _IdAlone:
    """In place of IdBounds: the last id that was read, which is where reading goes on."""

    def __init__(self, first: int, given_out: int) -> None:
        self.last = given_out

    def note(self, first: int, given_out: int) -> None: ...

    def below(self, txid: int) -> int:
        return self.last

    def forget(self, txid: int) -> None: ...


def read_by_id() -> None:
    """``id > last``: what commits after a later id has been read is lost."""
    turn = WindowReader.turn

    def turn_by_id(self: WindowReader, rows: Sequence[Row]) -> Cursor:
        if rows:
            self.bounds.last = rows[-1].id
        return turn(self, rows)

    _read_with(_WINDOW, _NO_WINDOW)
    reader.IdBounds = _IdAlone
    WindowReader.turn = turn_by_id


def read_by_transaction() -> None:
    """``txid < xmin``, by transactions: one that began earlier and wrote later comes first."""
    look = OutboxLog._look

    def look_at_xmin(self: OutboxLog, awake: bool = True, begin: bool = False) -> Look:
        seen = look(self, awake, begin)
        return replace(seen, snapshot=Snapshot(seen.snapshot.xmin, seen.snapshot.xmin))

    _read_with("ORDER BY id LIMIT", "ORDER BY txid, id LIMIT")
    OutboxLog._look = look_at_xmin
    reader.IdBounds.below = lambda self, txid: 0


def forget_who_ran() -> None:
    """Windows without the transactions that ran at their beginning: a slow one's rows are lost."""
    between = Window.between

    def without_those(since: Snapshot, target: Snapshot, after: int) -> Window:
        return replace(between(since, target, after), ended=())

    cursors.Window.between = without_those


def acknowledge_at_once() -> None:
    """What has been read counts as delivered: at a crash, what was under way is lost."""
    in_flight.Page.done = property(lambda self: True)


def trust_the_broker() -> None:
    """What a broadcaster has been given counts as acknowledged: at a crash, some never was."""

    def turn(self: forwarder.Forwarder) -> bool:
        self._publish(self._under_way if self._again else self._take())
        self._again = False
        self._done(self._sent - self._ahead, flushed=True)
        return True

    forwarder.Forwarder._turn = turn


def believe_the_triggers() -> None:
    """Nobody compares the triggers with what they were: a table that is remade is read no more."""

    def look(self: TriggerWatch, session: Any, now: Any, kept: Any) -> tuple[Fingerprint, None]:
        assert self.fingerprint is not None
        self.verified_at = now()
        return self.fingerprint, None

    TriggerWatch.look = look
    Fingerprint.covers = lambda self, kept, own, unread: True


def believe_the_writers() -> None:
    """What writers could not write to the outbox is missing, and nobody says so."""
    claims.Claims.note_shed = lambda self, part, shed: False
    Installation.note_failed_writers = lambda self, reading: None
    Installation.doubt = lambda self, since: None


def acknowledge_whole_transactions() -> None:
    """The first page of a transaction stands for all of it: at a crash, the others are lost."""
    position = WalReader._reached.fget
    assert position is not None

    def whole(self: WalReader) -> WalPosition:
        found: WalPosition = position(self)
        return WalPosition(found.commit_lsn + 1) if found.messages else found

    WalReader._reached = property(whole)


def acknowledge_messages() -> None:
    """A message's own LSN in place of its commit's: what was acknowledged comes again as new."""
    take, take_message = WalReader._take, WalReader._take_message
    latest: dict[WalReader, int] = {}

    def take_by_message(self: WalReader, data: bytes) -> int:
        before = self._lsn
        size = take(self, data)
        if self._lsn != before:
            self._lsn = max(before, latest.get(self, before))
        return size

    def note_message(self: WalReader, change: Any, size: int) -> int:
        latest[self] = change.lsn
        return take_message(self, change, size)

    WalReader._take = take_by_message
    WalReader._take_message = note_message
    WalReader.rest = lambda self, lsn: None


def make_slots_in_silence() -> None:
    """A slot that is gone, or begins later, is made or read without a word."""
    begin_at = WalLog._begin_at
    WalLog._begin_at = lambda self, position: (begin_at(self, position)[0], "")


def trust_the_slot() -> None:
    """Reading begins where the slot does, whatever has been acknowledged."""
    WalLog._begin_at = lambda self, position: (self._make_slot(), "")


def confirm_what_was_read() -> None:
    """The server is told of what has been read, as psycopg2 does by itself: it forgets that."""
    beat = ReplicationStream.beat

    def confirm(self: ReplicationStream) -> None:
        self.confirm(self.received)
        beat(self)

    ReplicationStream.beat = confirm


def never_doubt() -> None:
    """Nothing that comes again is said to."""
    WalReader.doubts = lambda self, message: False


def read_both() -> None:
    """Who comes from the outbox reads what came from there in the write-ahead log, too."""
    behind = WalLog.behind
    WalLog.behind = lambda self, snapshot: replace(behind(self, snapshot), since=None)


def begin_now() -> None:
    """Who comes to the outbox begins where that is by then, not where the former log was left."""

    def behind(self: OutboxLog, snapshot: Snapshot) -> Cursor:
        # Something is written meanwhile.
        self._execute("SELECT pg_catalog.pg_sleep(0.2)")
        [(text,)] = self._execute("SELECT pg_catalog.pg_current_snapshot()::text")
        return Cursor(Snapshot.parse(text), 0)

    OutboxLog.behind = behind


MUTANTS: dict[str, Callable[[], None]] = {
    "id": read_by_id,
    "txid": read_by_transaction,
    "running": forget_who_ran,
    "early": acknowledge_at_once,
    "trusting": trust_the_broker,
    "blind": believe_the_triggers,
    "unheeding": believe_the_writers,
    "page": acknowledge_whole_transactions,
    "lsn": acknowledge_messages,
    "silent": make_slots_in_silence,
    "slot": trust_the_slot,
    "unasked": confirm_what_was_read,
    "sure": never_doubt,
    "both": read_both,
    "now": begin_now,
}
