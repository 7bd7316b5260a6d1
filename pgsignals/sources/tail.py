"""Reads the outbox as it grows, for readers that keep resume tokens."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Protocol

from psycopg2 import errors as pg
from psycopg2.extensions import cursor as Cursor

from ..consumers.acks import Partition
from ..consumers.decoding import Row
from ..core.errors import PayloadError, StateError
from ..core.events import Event, Gap, Message, Topic, moment
from ..core.logging import log
from ..core.payload import Broken
from ..dispatch.in_flight import Page
from ..outbox.archive import Archive, Found
from ..outbox.provider import OutboxProvider
from ..outbox.reader import WindowReader
from ..outbox.resume_tokens import ResumePoint, TokenCodec
from ..postgres.connection import connect
from ..postgres.snapshot import Snapshot
from ..triggers import names
from ..triggers.definitions import Definition
from ..triggers.installer import Drift
from .base_tail import BaseTail, Decoders, source_of
from .thread import ConnectionSettings

# How many seconds the outbox keeps what all have read, unless the settings have a value already.
KEEP_SECONDS = 60
_ATTACH_SECONDS = 2.0


class Reader(Protocol):
    """Takes what a tail reads. The thread that reads calls it, so that no method may block."""

    def began(self, point: ResumePoint) -> None:
        """Take everything from this point on; nothing from before it follows any more."""

    def wants(self, topic: Topic) -> bool:
        """Whether events of the topic are for this reader."""

    def take(self, events: Sequence[Event], window: ResumePoint) -> None:
        """Take events of a ``window``; the point of an event in it is at the event's position."""

    def turned(self, point: ResumePoint) -> None:
        """Note that everything up to this point has been given."""

    def missed(self, gap: Gap) -> None:
        """Note that something may be missing here."""


class Tail(BaseTail[Reader], OutboxProvider):
    """Reads the outbox from now on for any number of readers, and again for those that come back.

    See BaseTail.
    """

    def __init__(
        self,
        options: ConnectionSettings,
        definitions: Callable[[], Sequence[Definition]],
        decoders: Decoders,
        drift: Callable[[Cursor, Sequence[Definition]], Drift | None],
    ) -> None:
        self._window: ResumePoint | None = None
        self._turned: ResumePoint | None = None
        self._archive: Archive | None = None
        # A lock apart from the condition, which the thread that reads takes with each page: that
        # thread must not wait while a reader that comes back waits for the database.
        self._archive_lock = threading.Lock()
        self._era = ""
        self.codec = TokenCodec("", "")
        super().__init__(options, definitions, decoders, drift)
        self.source = source_of(options, self)

    def stop(self, timeout: float) -> None:
        super().stop(timeout)
        if self._archive is not None:
            self._archive.close()

    def abandon(self) -> None:
        self._archive_lock = threading.Lock()
        super().abandon()
        if self._archive is not None:
            self._archive.abandon()

    def attach(self, reader: Reader) -> None:
        """Give the reader everything from now on, beginning with the point where it begins.

        Raises StateError while the database cannot be read.
        """
        with self._condition:
            # A reader begins between two windows: from the middle of one it would miss the rows
            # that were read before.
            if not self._condition.wait_for(lambda: self._turned is not None, _ATTACH_SECONDS):
                raise StateError("The outbox cannot be read now, or has too much to read.")
            assert self._turned is not None
            self._readers.append(reader)
            reader.began(self._turned)

    def read(self, point: ResumePoint) -> Found:
        """See Archive."""
        return self._open_archive().read(point)

    def check(self, point: ResumePoint) -> tuple[bool, bool]:
        """See Archive."""
        return self._open_archive().check(point)

    def installed_since(self, point: ResumePoint, wants: Callable[[Topic], bool]) -> bool:
        """Whether a wanted trigger may have been made after the point, and so missed changes."""
        return self._made_since(point.high, wants)

    def decode(self, row: Row) -> Message | Gap | None:
        """Decode a row of the outbox; None for one that no watcher reads."""
        found = self._decoders.get(row.channel)
        if found is None or not (found.wants(row) and found.owns(row)):
            return None
        try:
            message = found.decoder.decode(row.payload)
        except PayloadError as error:
            log.error("row %d of the outbox cannot be read: %s", row.id, error)
            now = self.source.now()
            return Gap(now, now, "watcher_broken", str(error))
        if isinstance(message, Broken):
            if message.at_us is None:
                return self.source.triggers.silent_failure(self.source.now())
            at = moment(message.at_us)
            return Gap(at, at, "watcher_broken", message.error)
        if not isinstance(message, Message):
            return None
        message.position = str(row.id)
        return message

    # The source's sink.

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
        page.acknowledge()

    def disconnected(self, error: BaseException) -> None:
        """See DurableSink."""
        with self._condition:
            self._turned = None

    # The source's preparer.

    def install(self, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        """See DurablePreparer: the Hub's own delivery has installed the triggers."""
        try:
            cursor.execute(
                "UPDATE pgsignals.settings SET keep_seconds = %s WHERE keep_seconds IS NULL",
                (KEEP_SECONDS,),
            )
            cursor.execute("INSERT INTO pgsignals.era DEFAULT VALUES ON CONFLICT DO NOTHING")
        except pg.InsufficientPrivilege as error:
            log.warning(
                "reconnecting browsers may see an unnecessary gap: this role cannot record how "
                "long events are kept (%s); GRANT UPDATE (keep_seconds) ON pgsignals.settings and "
                "INSERT ON pgsignals.era to it",
                str(error).strip(),
            )
        cursor.execute(
            "SELECT token_key::text, era::text FROM pgsignals.settings"
            " LEFT JOIN pgsignals.era ON true"
        )
        [(self._key, era)] = cursor.fetchall()
        # Without an era in the database, tokens are valid in this process alone.
        self._era = era or secrets.token_hex(16)

    # The source's follower.

    def part_begun(self, part: Partition) -> None:
        """Skip what came before: readers have it already, or read it again from the archive."""
        window = _reader(part)
        part.skip_to(window.log.present(window))
        point = _point(part)
        triggers = names.digest(*sorted(each.trigger.name for each in self._definitions))
        era = f"{part.announcing.epoch} {self._era}"
        codec, self.codec = self.codec, TokenCodec(self._key, era, triggers)
        if codec.epoch not in ("", self.codec.epoch):
            log.error("the server has crashed or been replaced: browsers that come back get a gap")
        with self._condition:
            self._lease = part.lease
            self._turned = point
            for reader in self._readers:
                reader.began(point)
            self._tell_gaps()
            self._condition.notify_all()

    def page_begun(self, part: Partition) -> None:
        """See Follower."""
        window = _reader(part).window
        assert window is not None
        self._window = _point(part, window.target)

    def page_submitted(self, part: Partition) -> None:
        """See Follower: the window may have come to its end."""
        if part.reader.at_end:
            point = _point(part)
            with self._condition:
                self._turned = point
                for reader in self._readers:
                    reader.turned(point)
                self._condition.notify_all()

    def _tell_gaps(self) -> None:
        gaps, self._gaps = self._gaps, []
        for gap in gaps:
            for reader in self._readers:
                reader.missed(gap)

    def _open_archive(self) -> Archive:
        with self._archive_lock:
            if self._archive is None:
                options = self._options
                with closing(connect(options.dsn, options.timing.timeout)) as connection:
                    encoding = connection.info.parameter_status("server_encoding") or "UTF8"
                self._archive = Archive(options.session_dsn, encoding, options.timing.timeout)
            return self._archive


def _reader(part: Partition) -> WindowReader:
    assert isinstance(part.reader, WindowReader)
    return part.reader


def _point(part: Partition, target: Snapshot | None = None) -> ResumePoint:
    reader = _reader(part)
    return ResumePoint(
        reader.since,
        reader.bounds.below(reader.since.xmin),
        reader.bounds.below(reader.since.xmax),
        part.announcing.shed,
        target,
    )
