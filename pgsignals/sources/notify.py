"""Messages by LISTEN: at most once, every possible loss announced by a Gap."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import datetime, timedelta

import psycopg2
from psycopg2.extensions import Notify
from psycopg2.extensions import cursor as Cursor

from ..core.errors import ConnectError, PayloadError
from ..core.events import Gap, Message, microseconds, moment
from ..core.logging import log
from ..core.metrics import Meter
from ..core.payload import Broken, Cast, Decoder, Foreign
from ..core.redaction import error_text
from ..plugins.source import Sink
from ..postgres.connection import connect
from ..postgres.notification_queue import QUEUE_WARNING, read_queue_usage
from ..postgres.session import Session
from ..triggers.definitions import Definition
from ..triggers.names import QUEUE_SHARE
from .session_checks import keep_triggers, listen_to
from .thread import ConnectionSettings, Preparer, SessionThread
from .trigger_watch import TriggersChangedError

# How long reading may pause for slow receivers before their events are shed. During a pause unread
# notifications fill the server's queue, which all of its databases share.
PAUSE_SECONDS = 30.0
# The same while a pause leaves another worker without work.
IDLE_SECONDS = 1.0
# The beginning of the heartbeat's payload, before the queue's usage and the server's time.
_USAGE = "usage "


class NotifySource(SessionThread):
    """Listens in one session, from one thread."""

    def __init__(
        self, settings: ConnectionSettings, preparer: Preparer, sink: Sink, meter: Meter
    ) -> None:
        super().__init__(settings, preparer, meter, "listening", settings.timing.heartbeat)
        self._sink = sink
        self._decoders: Mapping[str, Decoder] = {}
        self.received = 0
        # The time up to which everything has been heard, in microseconds since 1970 as in messages:
        # making a datetime for each message would take longer than handing the message over.
        self._heard = self._clock.now_us()
        self._set_back = 0
        self._asking = self._answered = False
        self._usage_read_at = time.monotonic()
        # Since when writers may not have notified, the queue being full; and its last look.
        self._silent_since: datetime | None = None
        self._judged_at = self.now()
        # Why the session was lost, and since when something may be missing.
        self._loss = ""
        self._lost_since = self._judged_at

    def _read(self, session: Session) -> None:
        self._sink.connected()
        heard_at = asked_at = time.monotonic()
        self._asking = False
        while not self._stopping:
            arrived = session.receive()
            # All of them, also while stopping: stop() returns whether all that arrived was handled.
            for notify in arrived:
                self._receive(notify)
            now = self._turned_at = time.monotonic()
            if arrived:
                heard_at = now
            if not self._asking and now - asked_at >= self._timing.heartbeat:
                self._asking = True
                asked_at = now
                session.send(*self._question)
            if self._answered:
                # After an answer, by which the connection has proved to be alive.
                self._answered = False
                self._look_at_triggers(session)
                continue
            if self._asking:
                due = max(heard_at, asked_at) + self._timing.timeout
                if now >= due:
                    raise TimeoutError(
                        f"no answer to the heartbeat within {self._timing.timeout:g} s"
                    )
            else:
                due = asked_at + self._timing.heartbeat
            if not arrived or session.plain:
                session.wait(due - now)

    def _look_at_triggers(self, session: Session) -> None:
        _, gap = self.triggers.look(session, self.now)
        if gap is not None:
            self._sink.gap(gap)

    @property
    def _question(self) -> tuple[str, tuple[str]]:
        """The heartbeat: a notification to ourselves, since only that proves that others arrive."""
        return (
            f"SELECT pg_catalog.pg_notify(%s, '{_USAGE}' ||"
            " pg_catalog.pg_notification_queue_usage() || ' ' ||"
            " (pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) * 1e6)::bigint)",
            (self.own_channel,),
        )

    def _receive(self, notify: Notify) -> None:
        if notify.channel == self.own_channel:
            self._receive_own(notify.payload)
            return
        decoder = self._decoders.get(notify.channel)
        if decoder is None:
            return
        try:
            message = decoder.decode(notify.payload)
        except PayloadError as error:
            self._refuse()
            log.warning(
                "ignored a payload on %s that is not from pgsignals: %s",
                notify.channel,
                error,
                extra={"channel": notify.channel, **decoder.topic.fields},
            )
            return
        if isinstance(message, Message):
            self.received += len(message.rows)
            if self._sink.full:
                self._make_room()
            self._sink.submit(message)
            # Notifications come in the order of their commits: nothing before this is missing. This
            # follows the submission, since the worker is on its way meanwhile.
            if message.at_us > self._heard:
                self._heard = min(message.at_us, self._clock.now_us())
        elif isinstance(message, Foreign):
            self.foreign[message.relation] += 1
        elif isinstance(message, Broken):
            log.error(
                "a watcher is broken: %s",
                message.error,
                extra={"channel": notify.channel, **decoder.topic.fields},
            )
            self._sink.gap(self.triggers.failure(message, self.now()))
        log.debug("received %d bytes on %s", len(notify.payload), notify.channel)

    def _receive_own(self, payload: str) -> None:
        if not payload.startswith(_USAGE):
            self._sink.reached(payload)
            return
        self._asking = False
        self._answered = True
        try:
            text, at = payload.removeprefix(_USAGE).split(" ")
            usage, answered = float(text), int(at)
        except ValueError:
            self._refuse()
            return
        # All that was committed before the server answered has arrived. The time is taken even if
        # it is earlier, since the server's clock may have been set back.
        self._heard = answered
        self._clock.set(answered)
        # After the clock: a Gap must not end before the time at which the usage was read.
        self._judge(usage)

    def _make_room(self) -> None:
        """Pause until each worker has room; after too long, drop the events of slow receivers."""
        began = time.monotonic()
        while not (self._stopping or self._sink.wait_for_room(0.1)):
            now = self._turned_at = time.monotonic()
            if now - began >= (IDLE_SECONDS if self._sink.idle else PAUSE_SECONDS):
                log.error(
                    "receivers are too slow: their events are dropped until there is room, and a "
                    "Gap is announced"
                )
                self._sink.give_up()
            elif now - self._usage_read_at >= self._timing.heartbeat:
                self._read_usage()

    def _read_usage(self) -> None:
        """Ask how full the server's queue is during a pause, in which no heartbeat tells it."""
        self._usage_read_at = time.monotonic()
        try:
            connection = connect(self._dsn, self._timing.timeout, self._timing.timeout)
            with closing(connection), connection.cursor() as cursor:
                self._judge(read_queue_usage(cursor))
        except (ConnectError, psycopg2.Error) as error:
            log.warning("cannot tell how full the notification queue is: %s", error_text(error))

    def _judge(self, usage: float) -> None:
        self._usage_read_at = time.monotonic()
        at = self.now()
        if usage >= QUEUE_SHARE:
            self._silent_since = self._silent_since or self._judged_at
        elif self._silent_since is not None:
            detail = "the notification queue was so full that writers did not notify"
            self._sink.gap(Gap(self._silent_since, at, "watcher_broken", detail))
            self._silent_since = None
        self._judged_at = at
        if usage >= QUEUE_WARNING:
            log.warning(
                "PostgreSQL's notification queue is %.0f%% full: a listener stays in a transaction "
                "or reads too slowly. When it is full, whoever notifies cannot commit; `pgsignals "
                "doctor` tells more.",
                100 * usage,
                extra={"queue_usage": usage},
            )

    def _listen(self, session: Session, cursor: Cursor, definitions: Sequence[Definition]) -> None:
        self._judge(read_queue_usage(cursor))
        self._prove_round_trip(session, cursor)
        timeout = self._timing.timeout
        keep_triggers(session, definitions, timeout)
        for definition in definitions:
            log.debug("listening on %s for %s", definition.channel, definition)
        # At once: a round trip for each of hundreds would take as long as all else.
        session.execute(listen_to(*(each.channel for each in definitions)), timeout=timeout)
        [(listening,)] = session.execute("SELECT pg_catalog.clock_timestamp()", timeout=timeout)
        self._heard = microseconds(listening)
        self._set_back += self._clock.set(self._heard)

    def _begin(
        self, session: Session, definitions: Sequence[Definition], asked_at: datetime, cast: Cast
    ) -> None:
        self.triggers.begin(session, definitions, asked_at, self._preparer.missing)
        self._decoders = {d.channel: d.decoder(cast) for d in definitions}

    def _lost(self, error: Exception) -> None:
        self._loss = error_text(error)
        self._sink.disconnected(error)
        since = moment(self._heard)
        if self.triggers.verified_at is not None and (
            isinstance(error, TriggersChangedError) or self.triggers.reason
        ):
            # The source heard all notifications, but triggers were missing that had to send some.
            since = min(since, self.triggers.verified_at)
        self._lost_since, self._set_back = since, 0

    def _regained(self) -> None:
        """Announce what may have been missed."""
        since = self._lost_since
        log.info("connected again; events since %s may be missing", since)
        # Where the server's clock was set back, missed events have times of before and after that.
        begun = since - timedelta(microseconds=self._set_back)
        # Only now that LISTEN is back: a Gap announced earlier would end before the loss does.
        self._sink.gap(Gap(begun, max(since, moment(self._heard)), "reconnected", self._loss))
