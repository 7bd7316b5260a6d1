"""Decodes the outbox's rows, by channels that may become known while a source reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from ..core.errors import PayloadError
from ..core.events import Event, Gap, Message
from ..core.logging import log
from ..core.payload import Broken, Cast, Decoder
from ..outbox.log import Described, Ids, OutboxLog
from ..outbox.reader import Row
from .trigger_watch import TriggerWatch


@dataclass(frozen=True)
class ChannelDecoder:
    """Reads a channel's messages, of those ``ids``; others have a twin in another channel.

    ``relations`` are the tables whose rows it takes, as in Described.
    """

    decoder: Decoder
    ids: Ids = ((0, None),)
    relations: Mapping[int, int | None] = field(default_factory=dict)

    def wants(self, row: Row) -> bool:
        """Whether the row is not one that another channel has too."""
        return any(first <= row.id and (end is None or row.id < end) for first, end in self.ids)

    def owns(self, row: Row) -> bool:
        """Whether the row is of a table that is, or was then, the watched one."""
        until = self.relations.get(row.relation, 0)
        return until is None or row.id < until


class RowDecoder:
    """Decodes the rows of one session after another.

    ``foreign`` counts, by OID, the rows of tables that are not the watched ones. ``refuse`` is
    called for a row that cannot be read, ``described`` when channels have become known.
    """

    def __init__(
        self,
        decoders: Callable[[Sequence[Described], Cast], Mapping[int, ChannelDecoder]],
        triggers: TriggerWatch,
        now: Callable[[], datetime],
        foreign: Counter[int],
        refuse: Callable[[], None],
        described: Callable[[], None],
    ) -> None:
        self._decoders_of = decoders
        self._triggers = triggers
        self._now = now
        self._foreign = foreign
        self._refuse = refuse
        self._on_described = described
        self._cast: Cast
        self._own: frozenset[int] = frozenset()
        self.channels: Mapping[int, ChannelDecoder] = {}

    def decoders(self) -> dict[int, Decoder]:
        """The decoder of each channel."""
        return {key: found.decoder for key, found in self.channels.items()}

    def begin(self, own: Sequence[int], described: Sequence[Described], cast: Cast) -> None:
        """Go on in a new session; ``own`` are the channels of our triggers."""
        self._own, self._cast = frozenset(own), cast
        self.channels = self._decoders_of(described, cast)

    def channel_of(self, event: Event) -> int:
        """The channel that an event came through; 0, which none has, if that is forgotten."""
        name = event._message.topic.name
        channels = (key for key, each in self.channels.items() if each.decoder.topic.name == name)
        return next(channels, 0)

    def describe(self, store: OutboxLog) -> None:
        """Learn of channels that were not known, and whose the rows of the others are.

        Which ids are read of those stays: what is read from one of two twins goes on to be.
        """
        known, found = self.channels, self._decoders_of(store.channels(), self._cast)
        self.channels = {**known, **found} | {
            key: replace(known[key], relations=found[key].relations)
            for key in known.keys() & found.keys()
        }
        self._on_described()

    def decode(
        self, store: OutboxLog, rows: Sequence[Row], since: datetime
    ) -> Iterator[Message | Gap]:
        """What ``rows`` are to the watchers; what cannot be read was written after ``since``.

        A trigger may be made, also for another table, at any time, and by anybody. It is described
        before it writes: what is asked after the rows were read knows whose each row is.
        """
        described = False
        for row in rows:
            found = self.channels.get(row.channel)
            if found is None:
                unknown = row.channel in self._own
            else:
                unknown = not found.owns(row) and found.wants(row)
            if unknown and not described:
                self.describe(store)
                described = True
                found = self.channels.get(row.channel)
            if found is None or not found.wants(row):
                continue
            if not found.owns(row):
                self._foreign[row.relation] += 1
                continue
            decoded = self._decode(found.decoder, row, since)
            if decoded is not None:
                yield decoded

    def _decode(self, decoder: Decoder, row: Row, since: datetime) -> Message | Gap | None:
        try:
            message = decoder.decode(row.payload)
        except PayloadError as error:
            self._refuse()
            detail = f"row {row.id} of the outbox cannot be read: {error}"
            log.error("%s", detail, extra=decoder.topic.fields)
            # Unlike a channel, which anybody may notify, it holds only what triggers wrote.
            return Gap(since, self._now(), "watcher_broken", detail)
        if isinstance(message, Broken):
            log.error("a watcher is broken: %s", message.error, extra=decoder.topic.fields)
            return self._triggers.failure(message, self._now())
        if not isinstance(message, Message):
            return None
        message.position = str(row.id)
        return message
