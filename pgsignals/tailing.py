"""The end of the outbox as it grows, for readers who keep their places themselves.

A process has one tail, however many readers, apart from the Hub's own consumer: that may have a
name, which shares its events among processes, and waits for receivers, which readers need not.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Protocol

from psycopg2 import errors as pg
from psycopg2.extensions import cursor as Cursor

from .connection import Session, connect
from .errors import PayloadError, StateError
from .events import Event, Gap, Message, Topic
from .metrics import Meter
from .outbox.archive import Archive, Found
from .outbox.cursors import Snapshot
from .outbox.pages import Page
from .outbox.parts import Part
from .outbox.places import Place, Signer
from .outbox.store import DeadLetter, Row, Store
from .payload import Broken, Cast
from .runs import Settings
from .sources.claims import Consumer
from .sources.outbox import ChannelDecoder, OutboxSource
from .triggers import names
from .triggers.definitions import Definition

log = logging.getLogger("pgsignals")

# For how long what all have read is kept at least, unless somebody has said otherwise.
KEEP_SECONDS = 60
_ATTACH_SECONDS = 2.0

Decoders = Callable[[Sequence[tuple[int, int, str]], Cast], Mapping[int, ChannelDecoder]]


class Reader(Protocol):
    """Whom a tail tells of what it reads. Called by the thread that reads: nothing may block."""

    def began(self, place: Place) -> None:
        """Nothing of what came before follows: from this place on, everything."""

    def wants(self, topic: Topic) -> bool:
        """Whether its events are for this reader."""

    def take(self, events: Sequence[Event], window: Place) -> None:
        """Take events of a window; an event's place is that in ``window`` of its position."""

    def turned(self, place: Place) -> None:
        """Everything up to this place has been given."""

    def missed(self, gap: Gap) -> None:
        """Something may be missing here."""


class Tail:
    """Reads the outbox from now on for any number of readers, and again for those who come back.

    What there is to prepare, the Hub's run has prepared: it gives its ``definitions`` and decoders.
    """

    def __init__(
        self,
        settings: Settings,
        definitions: Callable[[], Sequence[Definition]],
        decoders: Decoders,
    ) -> None:
        self._settings = settings
        self._defined = definitions
        self._decoders_of = decoders
        self._readers: list[Reader] = []
        self._condition = threading.Condition()
        self._window: Place | None = None
        self._turned: Place | None = None
        self._decoders: Mapping[int, ChannelDecoder] = {}
        self._definitions: Sequence[Definition] = ()
        self._since: dict[int, int] = {}
        self._archive: Archive | None = None
        self._holding = 0
        self._gaps: list[Gap] = []
        self._key = self._era = ""
        self.signer = Signer(self._key, "")
        self.source = _TailSource(self, settings)

    def start(self) -> None:
        """Connect, raising what is wrong, and read."""
        self.source.start()

    def stop(self, timeout: float) -> None:
        """End, waiting at most ``timeout`` seconds. Safe to call twice."""
        self.source.stop(timeout)
        if self._archive is not None:
            self._archive.close()

    def abandon(self) -> None:
        """In the child of a fork: give up what is inherited."""
        self._condition = threading.Condition()
        self._readers = []
        self.source.abandon()
        if self._archive is not None:
            self._archive.abandon()

    def attach(self, reader: Reader) -> None:
        """Tell the reader from now on, first of where it begins.

        Raises StateError while the database cannot be read.
        """
        with self._condition:
            # In the middle of a window there is no place from which on it would get everything.
            if not self._condition.wait_for(lambda: self._turned is not None, _ATTACH_SECONDS):
                raise StateError("The outbox cannot be read now, or has too much to read.")
            assert self._turned is not None
            self._readers.append(reader)
            reader.began(self._turned)

    def detach(self, reader: Reader) -> None:
        """Tell the reader no more."""
        with self._condition:
            if reader in self._readers:
                self._readers.remove(reader)

    def hurry(self) -> None:
        """Look for something new at once."""
        self.source.hurry()

    def read(self, place: Place) -> Found:
        """See Archive."""
        return self._open_archive().read(place)

    def check(self, place: Place) -> tuple[bool, bool]:
        """See Archive."""
        return self._open_archive().check(place)

    def installed_since(self, place: Place, wants: Callable[[Topic], bool]) -> bool:
        """Whether a wanted trigger may have been made after the place, so that some were missed."""
        return any(
            self._since.get(names.channel_key(each.trigger.hash), 0) > place.high
            for each in self._definitions
            if wants(each.topic)
        )

    def decode(self, row: Row) -> Message | Gap | None:
        """A row of the outbox; None for one that is no watcher's."""
        found = self._decoders.get(row.channel)
        if found is None or (found.until is not None and row.id >= found.until):
            return None
        try:
            message = found.decoder.decode(row.payload)
        except PayloadError as error:
            log.error("row %d of the outbox cannot be read: %s", row.id, error)
            now = self.source.now()
            return Gap(now, now, "watcher_broken", str(error))
        if isinstance(message, Broken):
            at = datetime.fromtimestamp(message.at_us / 1e6, timezone.utc)
            return Gap(at, at, "watcher_broken", message.error)
        if message is not None:
            message.position = str(row.id)
        return message

    # The source's sink.

    @property
    def full(self) -> bool:
        """See DurableSink: readers keep what they can, and read again what they cannot."""
        return False

    def submit_page(self, events: Sequence[Event], page: Page) -> None:
        """See DurableSink."""
        window = self._window
        assert window is not None
        with self._condition:
            self._turned = None
            for reader in self._readers:
                wanted = [event for event in events if reader.wants(event._message.topic)]
                if wanted:
                    reader.take(wanted, window)
        page.finish()

    def gap(self, gap: Gap, page: Page | None = None) -> None:
        """See DurableSink."""
        with self._condition:
            self._gaps.append(gap)
            if not self._holding:
                self._tell_gaps()
        if page is not None:
            page.finish()

    def redeliver(self, event: Event, letter: DeadLetter) -> bool:
        """See DurableSink: there are no dead letters."""
        return False

    def hears(self, topic: Topic) -> bool:
        """See DurableSink."""
        return True

    def connected(self) -> None:
        """See DurableSink."""

    def disconnected(self, error: BaseException) -> None:
        """See DurableSink."""
        with self._condition:
            self._turned = None

    # The source's preparer.

    def define(self, cursor: Cursor) -> Sequence[Definition]:
        """See OutboxPreparer."""
        self._definitions = self._defined()
        return self._definitions

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """See OutboxPreparer: what there is to prepare, the run has prepared."""
        try:
            cursor.execute(
                "UPDATE pgsignals.settings SET keep_seconds = %s WHERE keep_seconds IS NULL",
                (KEEP_SECONDS,),
            )
            cursor.execute("INSERT INTO pgsignals.era DEFAULT VALUES ON CONFLICT DO NOTHING")
        except pg.InsufficientPrivilege as error:
            log.warning(
                "browsers that come back may get a gap where they would need none, since this role "
                "may not note what is kept for them (%s): GRANT UPDATE (keep_seconds) ON "
                "pgsignals.settings and INSERT ON pgsignals.era to it",
                str(error).strip(),
            )
        cursor.execute(
            "SELECT place_key::text, era::text FROM pgsignals.settings"
            " LEFT JOIN pgsignals.era ON true"
        )
        [(self._key, era)] = cursor.fetchall()
        # Without one that all know, ids are good in this process alone.
        self._era = era or secrets.token_hex(16)

    def decoders(
        self, channels: Sequence[tuple[int, int, str]], cast: Cast
    ) -> Mapping[int, ChannelDecoder]:
        """See OutboxPreparer."""
        self._since = {channel: since for channel, since, _ in channels}
        self._decoders = self._decoders_of(channels, cast)
        return self._decoders

    # What the source says beyond that.

    def began(self, place: Place, epoch: str) -> None:
        """Reading has begun, maybe anew, at a place."""
        signer, self.signer = self.signer, Signer(self._key, f"{epoch} {self._era}")
        if signer.epoch not in ("", self.signer.epoch):
            log.error("the server has crashed or been replaced: browsers are told of a gap")
        with self._condition:
            self._turned = place
            for reader in self._readers:
                reader.began(place)
            self._condition.notify_all()

    @contextmanager
    def holding_gaps(self) -> Iterator[None]:
        """Tell of gaps afterwards, when reading may have begun anew."""
        self._holding += 1
        try:
            yield
        finally:
            with self._condition:
                self._holding -= 1
                if not self._holding:
                    self._tell_gaps()

    def _tell_gaps(self) -> None:
        gaps, self._gaps = self._gaps, []
        for gap in gaps:
            for reader in self._readers:
                reader.missed(gap)

    def reading(self, window: Place) -> None:
        """The page that comes is of this window."""
        self._window = window

    def turned(self, place: Place) -> None:
        """The window has come to its end."""
        with self._condition:
            self._turned = place
            for reader in self._readers:
                reader.turned(place)
            self._condition.notify_all()

    def _open_archive(self) -> Archive:
        with self._condition:
            if self._archive is None:
                settings = self._settings
                connection = connect(settings.dsn, settings.timing.timeout)
                try:
                    encoding = connection.info.parameter_status("server_encoding") or "UTF8"
                finally:
                    connection.close()
                self._archive = Archive(settings.listen_dsn, encoding, settings.timing.timeout)
            return self._archive


class _TailSource(OutboxSource):
    """Begins at the present whenever it begins, and says which windows it reads."""

    def __init__(self, tail: Tail, settings: Settings) -> None:
        super().__init__(
            settings.dsn,
            settings.listen_dsn,
            tail,
            tail,
            settings.timing,
            # What it reads is counted where receivers get it.
            Meter(),
            Consumer(),
            1 << 30,
        )
        self._tail = tail

    def hurry(self) -> None:
        """Look at once."""
        self._waiter.wake()

    def _register(self, store: Store, session: Session) -> None:
        with self._tail.holding_gaps():
            super()._register(store, session)

    def _claim(self, store: Store) -> None:
        with self._tail.holding_gaps():
            super()._claim(store)

    def _acknowledge(self, store: Store, renew: bool) -> None:
        with self._tail.holding_gaps():
            super()._acknowledge(store, renew)

    def _begun(self, store: Store, part: Part) -> None:
        """Leave out what came before, which readers have, or read again by themselves."""
        before = store.look(awake=True, begin=True)
        assert before.began is not None
        part.start_at(store.look(awake=True), before.began + 1, before.given_out)
        self._tail.began(_place(part, part.since), self._claims.epoch)

    def _read_page(self, store: Store, part: Part) -> bool:
        assert part.window is not None
        self._tail.reading(_place(part, part.since, part.window.target))
        found = super()._read_page(store, part)
        if part.window is None:
            self._tail.turned(_place(part, part.since))
        return found


def _place(part: Part, since: Snapshot, target: Snapshot | None = None) -> Place:
    floors = part.floors
    return Place(
        since,
        floors.below(since.xmin),
        floors.below(since.xmax),
        part.telling.shed,
        target,
    )
