"""Dead letters on their way: from a consumer's workers to the database, and back when wanted."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue

from ..errors import PayloadError
from ..events import Event, Message
from ..metrics import Meter
from ..outbox.store import DeadLetter, Letter, Store
from ..payload import Decoder

log = logging.getLogger("pgsignals")


class Letters:
    """What workers want kept or forgotten, until the thread with the session has done it."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._queue: SimpleQueue[tuple[Letter | int, Callable[[], None]]] = SimpleQueue()

    def bury(self, letter: Letter, kept: Callable[[], None]) -> None:
        """Have an event kept as a dead letter, and ``kept`` called then."""
        self._queue.put((letter, kept))

    def unbury(self, key: int) -> None:
        """Have a dead letter forgotten."""
        self._queue.put((key, lambda: None))

    def save(self, store: Store) -> None:
        """Do what has been asked for by now."""
        with contextlib.suppress(Empty):
            while True:
                letter, kept = self._queue.get_nowait()
                if isinstance(letter, Letter):
                    store.bury(letter)
                    self._meter.count("dead_letters", receiver=letter.receiver)
                else:
                    store.unbury(letter)
                kept()

    def redeliver(
        self,
        store: Store,
        decoders: Mapping[int, Decoder],
        deliver: Callable[[Event, DeadLetter], bool],
    ) -> None:
        """Deliver those that somebody wants delivered again, each to its receiver.

        ``decoders`` are those of the channels, ``deliver`` says whether there is such a receiver.
        """
        for letter in store.wanted_again():
            decoder = decoders.get(letter.channel)
            message = None
            if decoder is not None:
                with contextlib.suppress(PayloadError):
                    message = decoder.decode(letter.payload)
            if not isinstance(message, Message) or letter.number >= len(message.rows):
                log.error("dead letter %d cannot be read any more", letter.key)
                continue
            message.redelivered = True
            event = Event(message, letter.number, message.rows[letter.number])
            if not deliver(event, letter):
                log.error(
                    "dead letter %d waits for the receiver %s, which this process does not have",
                    letter.key,
                    letter.receiver,
                )
