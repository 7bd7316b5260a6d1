"""Reads the overview of a database: each part at its own pace, through one session."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from ..consumers import dead_letters
from ..consumers.channels import Channel, read_channels
from ..consumers.consumer_store import claim_key
from ..consumers.slot_states import SlotState
from ..core.errors import DatabaseError, PgSignalsError
from ..core.redaction import error_text
from ..core.transport import Transport
from ..core.units import age_text, size_text
from ..outbox.inspection import wanted_channels
from ..outbox.schema import read_version
from ..postgres.connection import connect
from ..triggers.catalogue import Installed
from ..triggers.names import channel_key, slot_name
from .checks import examine
from .checks.findings import Finding
from .events import ShownEvent, count_rows, shown_events
from .letters import read_letter, read_letters
from .live import MOST_MESSAGES, Durable, Live, RawConsumer, read_live
from .model import ConsumerState, Letter, LetterDetail, Letters, OutboxSize, Overview, WatcherState
from .watchers import read_definition, read_watchers

# How long what seldom changes is taken for true. With these, and a look every LIVE_SECONDS at what
# changes, the server answers less than one statement a second, however many look on.
LIVE_SECONDS = 2.0
WATCHERS_SECONDS = 60.0
FINDINGS_SECONDS = 180.0
# However often somebody asks, checks are this far apart.
AGAIN_SECONDS = 10.0

# A consumer that is behind for so long is worth a reason.
_LATE_SECONDS = 5.0
# A statement that takes longer is given up: whoever looks on must not burden a server in need.
_PATIENCE = 15.0
# The most events to keep of what was heard at once.
MOST_EVENTS = 500
# The share of the newest number in a rate.
_NEWEST = 0.5

_OPERATIONS = ("inserted", "updated", "deleted")

_READABLE = """
SELECT coalesce(pg_catalog.bool_and(
  pg_catalog.has_schema_privilege(n.oid, 'USAGE')
  AND CASE c.relkind WHEN 'S' THEN pg_catalog.has_sequence_privilege(c.oid, 'SELECT')
      ELSE pg_catalog.has_table_privilege(c.oid, 'SELECT') END), false)
FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
WHERE n.nspname = 'pgsignals' AND c.relname IN ('outbox', 'outbox_id', 'outbox_shed', 'consumers',
  'channels', 'dead_letters', 'parked', 'backfills', 'backfill_parts')
"""


class Reader:
    """Reads a database's overview, for one thread. It installs nothing, and is no consumer.

    ``values``: events and dead letters have their values. Without them, nothing that a row holds
    but its key leaves this object; the error of a receiver may quote what it likes.
    """

    def __init__(self, dsn: str, *, values: bool = False) -> None:
        self._dsn = dsn
        self._values = values
        self._connection: Connection | None = None
        self._overview = Overview(datetime.now(timezone.utc))
        self._events: list[ShownEvent] = []
        self._listened: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._watchers_at = self._findings_at = float("-inf")
        self._installed: Sequence[Installed] = ()
        self._by_channel: Mapping[int, WatcherState] = {}
        self._by_name: Mapping[str, WatcherState] = {}
        self._known: Mapping[int, Channel] = {}
        self._wanted: Mapping[str, Mapping[int, int | None]] = {}
        self._stored: Mapping[str, object] = {}
        self._durable = False
        self._after: int | None = None
        self._counted_at: float | None = None
        self._counts: dict[str, int] = defaultdict(int)
        self._changes: Mapping[int, tuple[int, int, int]] = {}
        self._letters_mark: object = None

    @property
    def overview(self) -> Overview:
        """What was read last."""
        return self._overview

    @property
    def connection(self) -> Connection | None:
        """The session, if there is one."""
        return self._connection

    def close(self) -> None:
        """Close the session."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._listened = set()

    def read(self, *, findings: bool = True) -> Overview:
        """Read what is due; an overview with a ``problem``, and no session, if that fails."""
        try:
            return self._read(findings)
        except (PgSignalsError, psycopg2.Error) as error:
            self.close()
            self._begin()
            self._overview = replace(
                self._overview,
                at=datetime.now(timezone.utc),
                connected=False,
                problem=error_text(error),
                rates={},
            )
            return self._overview

    def _read(self, findings: bool) -> Overview:
        cursor = self._cursor()
        now = time.monotonic()
        if now - self._watchers_at >= WATCHERS_SECONDS:
            self._read_watchers(cursor)
        live = self._read_live(cursor)
        durable = live.durable
        if durable is not None and self._stored != _stored(durable.consumers):
            # A consumer has come, gone, or has other watchers: what it reads has to be known first.
            self._read_watchers(cursor)
            live = self._read_live(cursor)
            durable = live.durable
        self._note(live)
        found = replace(
            self._overview,
            at=live.at,
            connected=True,
            queue_usage=live.queue,
            slots=live.slots,
            outbox=None,
            consumers=(),
            parked=(),
            backfills=(),
            dead_letters=Letters(),
        )
        if durable is not None:
            found = replace(
                found,
                outbox=OutboxSize(durable.bytes, durable.shed),
                consumers=self._consumers(durable, live.slots),
                parked=durable.parked,
                backfills=durable.backfills,
                dead_letters=self._letters(cursor, durable),
            )
        self._overview = found
        if findings and now - self._findings_at >= FINDINGS_SECONDS:
            self._findings_at = now
            done: Sequence[Finding] = tuple(examine(self._dsn, (), (), None))
            self._overview = replace(found, findings=tuple(done), findings_at=live.at)
        return self._overview

    def _cursor(self) -> Cursor:
        if self._connection is None or self._connection.closed:
            self.close()
            self._connection = connect(self._dsn, patience=_PATIENCE)
            self._begin()
        return self._connection.cursor()

    def _read_watchers(self, cursor: Cursor) -> None:
        """Read what is installed, and who reads which channel."""
        problem = ""
        try:
            version = read_version(cursor)
        except DatabaseError as error:
            version, problem = 0, str(error)
        self._durable = False
        readers: dict[int, list[str]] = defaultdict(list)
        if version:
            cursor.execute(_READABLE)
            [(self._durable,)] = cursor.fetchall()
            if not self._durable:
                problem = (
                    "This role may not read the schema pgsignals: consumers, dead letters and "
                    "backfills are not shown. Have its owner GRANT USAGE ON SCHEMA pgsignals, and "
                    "SELECT ON ALL TABLES and ALL SEQUENCES IN SCHEMA pgsignals."
                )
        if self._durable:
            self._known = read_channels(cursor)
            cursor.execute("SELECT name, channels, ephemeral FROM pgsignals.consumers")
            wanted: dict[str, Mapping[int, int | None]] = {}
            stored = {}
            for name, channels, ephemeral in cursor.fetchall():
                wanted[name] = wanted_channels(channels, self._known)
                stored[name] = tuple(channels)
                for channel in () if ephemeral else channels:
                    if name not in readers[channel]:
                        readers[channel].append(name)
            self._wanted, self._stored = wanted, stored
        watchers, self._installed = read_watchers(cursor, readers)
        self._by_name = {each.name: each for each in watchers}
        self._by_channel = {
            channel_key(item.hash): self._by_name[item.name] for item in self._installed
        }
        connection = cursor.connection
        cursor.execute("SELECT current_user, pg_catalog.current_database()")
        [(user, database)] = cursor.fetchall()
        version = connection.server_version
        self._overview = replace(
            self._overview,
            watchers=tuple(watchers),
            problem=problem,
            database=database,
            user=user,
            host=connection.info.host or "a local socket",
            server=f"PostgreSQL {version // 10000}.{version % 10000}",
        )
        self._watchers_at = time.monotonic()

    def _read_live(self, cursor: Cursor) -> Live:
        logged = [each.oid for item in self._installed if item.tag.rows for each in item.fired]
        return read_live(cursor, self._durable, logged, self._wanted, self._after)

    def _note(self, live: Live) -> None:
        """Take in the events that have been written since the last look, and how many they are."""
        durable = live.durable
        if durable is not None:
            if self._after is not None:
                for each in durable.counted:
                    if (watcher := self._by_channel.get(each.channel)) is not None:
                        self._counts[watcher.name] += each.events
                for row in reversed(durable.written):
                    if (watcher := self._by_channel.get(row.channel)) is not None:
                        self._events += shown_events(watcher, row.payload, self._values)
            self._after = durable.last_id
        changes = {each.oid: (each.inserted, each.updated, each.deleted) for each in live.changed}
        for item in self._installed:
            if item.tag.rows and item.tag.op in _OPERATIONS:
                number = _OPERATIONS.index(item.tag.op)
                for table in item.fired:
                    new, old = changes.get(table.oid), self._changes.get(table.oid)
                    if new is not None and old is not None:
                        self._counts[item.name] += max(0, new[number] - old[number])
        self._changes = changes
        now = time.monotonic()
        if self._counted_at is not None:
            elapsed = max(0.1, now - self._counted_at)
            before = self._overview.rates
            rates = {}
            for watcher in self._by_name.values():
                if not self._counts_of(watcher):
                    continue
                rate = self._counts.get(watcher.name, 0) / elapsed
                rate = _NEWEST * rate + (1 - _NEWEST) * before.get(watcher.name, rate)
                rates[watcher.name] = 0.0 if rate < 0.05 else round(rate, 1)
            self._overview = replace(self._overview, rates=rates)
        self._counted_at = now
        self._counts.clear()

    def _counts_of(self, watcher: WatcherState) -> bool:
        """Whether events of a watcher are counted: those that nothing tells of are not 0."""
        if watcher.delivery == "notify":
            return watcher.name in self._listened
        if watcher.delivery == "wal":
            return watcher.served == "rows" and watcher.op in _OPERATIONS
        return True

    def _consumers(self, durable: Durable, slots: Iterable[SlotState]) -> tuple[ConsumerState, ...]:
        held = set(durable.held)
        dead = {each.consumer: each.count for each in durable.letters}
        named = {slot.name: slot for slot in slots}
        found = []
        for raw in durable.consumers:
            slot = named.get(slot_name(self._overview.database, raw.name)) if raw.wal else None
            active = raw.holder is not None and claim_key(raw.name, raw.part, raw.token) in held
            host, _, rest = (raw.holder or "").partition(":")
            number = rest.partition(":")[0]
            state = ConsumerState(
                name=raw.name,
                part=raw.part,
                parts=raw.parts,
                kind="stream" if raw.ephemeral else "backend" if "/" in raw.name else "consumer",
                ephemeral=raw.ephemeral,
                active=active,
                host=host,
                pid=int(number) if number.isdecimal() else None,
                delivery="wal" if raw.wal else "outbox",
                lag=None if raw.wal else raw.events,
                counted=raw.messages < MOST_MESSAGES,
                lag_bytes=max(0, raw.unread_bytes or 0) if raw.wal else raw.bytes,
                lag_seconds=round(raw.quiet if raw.wal else raw.seconds, 1),
                acknowledged=raw.acknowledged,
                acknowledged_at=raw.acknowledged_at,
                dead_letters=dead.get(raw.name, 0),
                slot=slot,
                reason="",
            )
            parked = [each for each in durable.parked if each.consumer == raw.name]
            reason = _reason(state, raw, [each.receiver for each in parked])
            found.append(replace(state, reason=reason))
        return tuple(found)

    def _letters(self, cursor: Cursor, durable: Durable) -> Letters:
        if not durable.letters:
            self._letters_mark = durable.letters
            return Letters()
        before = self._overview.dead_letters
        latest = before.latest
        if durable.letters != self._letters_mark:
            latest = read_letters(cursor, self._known)
            self._letters_mark = durable.letters
        return Letters(
            sum(each.count for each in durable.letters),
            {each.consumer: each.count for each in durable.letters},
            latest,
        )

    # What is asked for by hand.

    def check_again(self) -> None:
        """Have the checks made, and the watchers read, with the next look."""
        now = time.monotonic()
        if now - self._findings_at >= AGAIN_SECONDS:
            self._findings_at = self._watchers_at = float("-inf")

    def letters(self, before: int | None, consumer: str) -> tuple[Letter, ...]:
        """Return the dead letters below an id, the latest first."""
        cursor = self._ready()
        return read_letters(cursor, self._known, before, consumer) if self._durable else ()

    def letter(self, key: int) -> LetterDetail:
        """Return a dead letter with its traceback. Raises DatabaseError when there is none."""
        cursor = self._ready()
        if not self._durable:
            raise DatabaseError("There are no dead letters in this database.")
        return read_letter(cursor, self._known, key, self._values)

    def definition(self, name: str) -> str:
        """Return the SQL of a watcher's trigger. Raises DatabaseError when there is none."""
        return read_definition(self._ready(), name)

    def retry(self, keys: Sequence[int]) -> int:
        """Have these dead letters delivered again; return how many there are."""
        return dead_letters.retry(self._ready(), keys)

    def drop(self, keys: Sequence[int]) -> int:
        """Discard these dead letters; return how many there were."""
        return dead_letters.drop_letters(self._ready(), keys)

    def _ready(self) -> Cursor:
        cursor = self._cursor()
        if self._watchers_at == float("-inf"):
            self._read_watchers(cursor)
        return cursor

    # What is heard.

    def listen(self, wanted: bool) -> None:
        """Hear the notifications of what is installed by now, or of nothing."""
        if self._connection is None:
            return
        names = {
            each.name
            for each in self._overview.watchers
            if wanted and each.delivery == "notify" and each.table is not None
        }
        statements = [
            sql.SQL("UNLISTEN {}").format(sql.Identifier(name))
            for name in sorted(self._listened - names)
        ]
        statements += [
            sql.SQL("LISTEN {}").format(sql.Identifier(name))
            for name in sorted(names - self._listened)
        ]
        if statements:
            try:
                self._connection.cursor().execute(sql.SQL("; ").join(statements))
            except psycopg2.Error:
                # The next read tells what is wrong; a standby can be read, and cannot listen.
                with suppress(psycopg2.Error):
                    self._connection.poll()
                return
            self._listened = names

    def hear(self) -> None:
        """Take in the notifications that have come. Raises psycopg2.Error for a lost session."""
        if self._connection is None:
            return
        self._connection.poll()
        heard, self._connection.notifies = self._connection.notifies, []
        # Of a bulk's events all are counted, and the latest shown.
        latest: list[list[ShownEvent]] = []
        left = MOST_EVENTS
        for notice in reversed(heard):
            watcher = self._by_name.get(notice.channel)
            if watcher is not None and watcher.delivery == Transport.NOTIFY.value:
                self._counts[watcher.name] += count_rows(notice.payload)
                if left > 0:
                    latest.append([*shown_events(watcher, notice.payload, self._values)])
                    left -= len(latest[-1])
        for events in reversed(latest):
            self._events += events

    def events(self) -> list[ShownEvent]:
        """Return the events that have come since the last call."""
        found, self._events = self._events, []
        return found


def _stored(consumers: Iterable[RawConsumer]) -> dict[str, object]:
    return {each.name: each.channels for each in consumers}


def _reason(state: ConsumerState, raw: RawConsumer, slow: Sequence[str]) -> str:
    """Return what holds a consumer up, as far as the database can tell; empty if nothing does."""
    slot = state.slot
    if raw.lost_until is not None:
        return f"events up to {raw.lost_until:%Y-%m-%d %H:%M}Z are lost: it will get a Gap"
    if state.delivery == "wal" and not state.ephemeral:
        if slot is None:
            return "its replication slot is gone: it will get a Gap"
        if slot.invalidation:
            return f"the server has given up its slot ({slot.invalidation}): it will get a Gap"
        if slot.begins is None:
            return "its slot is being made, and waits for transactions that are writing"
    late = state.lag_seconds >= _LATE_SECONDS
    if not state.active:
        if state.ephemeral:
            return ""
        behind = state.lag or (state.delivery == "wal" and late)
        return "no process reads it" if behind else "no process runs"
    if slow:
        return f"events wait for the slow receiver {', '.join(slow)}"
    if late and state.kind == "backend":
        return f"its broker has acknowledged nothing for {age_text(state.lag_seconds)}"
    if late and state.lag != 0:
        return "a receiver is slow, hangs, or is called again after an error"
    if late and state.lag_bytes > 1 << 20:
        return f"{size_text(state.lag_bytes)} of the log are unread"
    return ""
