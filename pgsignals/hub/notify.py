"""Notify delivery: events by LISTEN, at most once."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from ..core.events import Event, Gap, Message
from ..core.metrics import Meter
from ..dispatch.forwarder import Forwarder
from ..plugins.broadcaster import Broadcaster
from ..postgres.connection import opened
from ..sources.notify import NotifySource
from .callbacks import Callbacks
from .delivery import DatabaseDelivery
from .options import Options
from .setup import Setup


class NotifyDelivery(DatabaseDelivery):
    """Delivers events from notifications: it is the sink of the source."""

    _hangs = "the thread that listens has ended or hangs"

    def __init__(
        self,
        options: Options,
        callbacks: Callbacks,
        meter: Meter,
        broadcasters: Sequence[Broadcaster],
    ) -> None:
        forwarders = [
            Forwarder(each, options.queue_size, meter, callbacks.tell_gap) for each in broadcasters
        ]
        super().__init__(
            options,
            callbacks,
            meter,
            None,
            now=lambda: self.source.now(),
            backends=forwarders,
        )
        self._awaited: dict[str, Callable[[], None]] = {}
        setup = Setup(options, callbacks.registry, meter, self.gap)
        self.source = NotifySource(options, setup, self, meter)

    def start(self) -> None:
        self.source.start()
        super().start()

    def _stop_reading(self, timeout: float) -> None:
        self.source.stop(timeout)

    def _close(self, timeout: float) -> None:
        """Do nothing: without acknowledgements the session has ended with the reading."""

    def abandon(self) -> None:
        self.source.abandon()
        super().abandon()

    def settle(self, call: Callable[[], None]) -> None:
        marker = secrets.token_hex(8)
        self._awaited[marker] = call
        with opened(self._options.dsn) as cursor:
            cursor.execute("SELECT pg_notify(%s, %s)", (self.source.own_channel, marker))

    @property
    def _sources(self) -> Sequence[NotifySource]:
        return [self.source]

    @property
    def idle(self) -> bool:
        """See Sink."""
        return self.dispatcher.idle

    def submit(self, message: Message) -> None:
        """See Sink."""
        if self._backends:
            # Past the dispatcher: otherwise a broker would miss events because of slow receivers.
            events = [Event(message, number, row) for number, row in enumerate(message.rows)]
            for backend in self._backends:
                backend.submit_page(events)
        self.dispatcher.submit(message)
        self._meter.count("events", len(message.rows), **message.topic.fields)

    def give_up(self) -> None:
        """See Sink."""
        self.dispatcher.give_up()

    def gap(self, gap: Gap) -> None:
        """See Sink."""
        for backend in self._backends:
            backend.gap(gap)
        self.dispatcher.announce(lambda: self._callbacks.tell_gap(gap))

    def reached(self, marker: str) -> None:
        """See Sink."""
        if (call := self._awaited.pop(marker, None)) is not None:
            self.dispatcher.settle(call)
