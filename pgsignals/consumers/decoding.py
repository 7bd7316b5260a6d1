"""Decodes a log's messages, by channels that may become known while a source reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

import msgspec

from ..core.errors import PayloadError
from ..core.events import Event, Gap, Message
from ..core.logging import log
from ..core.payload import Broken, Cast, Decoder
from ..triggers import names
from ..triggers.definitions import Definition
from .channels import Described, Ids, predecessors, read_by, read_described
from .consumer_store import Channels
from .log import DecoderHooks, Log


class Row(msgspec.Struct, frozen=True, gc=False):
    """A message of a log; ``relation`` is the OID of the table that fired its trigger.

    Ids go up in the order in which transactions that wait for one another have written.
    """

    id: int
    channel: int
    relation: int
    payload: str

    @property
    def position(self) -> str:
        """The message's position in the log, for people."""
        return str(self.id)


class Placed(Protocol):
    """Something that a log has of one table, at an id."""

    @property
    def id(self) -> int: ...

    @property
    def relation(self) -> int: ...


@dataclass(frozen=True)
class ChannelDecoder:
    """Reads the messages of a channel that have these ``ids``; another channel has the others too.

    ``relations`` are the tables whose rows it takes, as in Described.
    """

    decoder: Decoder
    ids: Ids = ((0, None),)
    relations: Mapping[int, int | None] = field(default_factory=dict)

    def wants(self, row: Placed) -> bool:
        """Whether the row is read from this channel, rather than from another that has it too."""
        return self._read_throughout(row.id, row.id)

    def takes(self, first: Placed, last: Placed) -> bool:
        """Whether ``wants`` and ``owns`` hold from one row of a table to another one of it."""
        return self.owns(last) and self._read_throughout(first.id, last.id)

    def _read_throughout(self, first: int, last: int) -> bool:
        # The latest ids come last, and are asked for most.
        for start, end in reversed(self.ids):
            if start <= first and (end is None or last < end):
                return True
        return False

    def owns(self, row: Placed) -> bool:
        """Whether the row is of the watched table, or of one that was the watched one then."""
        until = self.relations.get(row.relation, 0)
        return until is None or row.id < until


class RowDecoder:
    """Decodes the rows of one session after another; ``decoders`` says how to read each channel.

    ``keeps``: messages keep their payloads, since the log does not hold them for as long as it may
    take to park their events.
    """

    def __init__(
        self,
        decoders: Callable[[Sequence[Described], Cast], Mapping[int, ChannelDecoder]],
        hooks: DecoderHooks,
        keeps: bool = False,
    ) -> None:
        self._decoders_of = decoders
        self._keeps = keeps
        self._hooks = hooks
        self._log: Log
        self._cast: Cast
        self._definitions: Sequence[Definition] = ()
        self._described: Sequence[Described] = ()
        self._own: frozenset[int] = frozenset()
        self._found: Mapping[int, ChannelDecoder] = {}

    @property
    def channels(self) -> Channels:
        return read_by(sorted(self._own), self._described)

    def begin(self, log: Log, definitions: Sequence[Definition], cast: Cast) -> None:
        self._log, self._definitions, self._cast = log, definitions, cast
        self._own = frozenset(names.channel_key(each.trigger.hash) for each in definitions)
        self._described = read_described(log.consumer)
        self._found = self._decoders_of(self._described, cast)

    def predecessors(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        return predecessors(self._definitions, self._described)

    def decoders(self) -> dict[int, Decoder]:
        return {key: found.decoder for key, found in self._found.items()}

    def channel_of(self, event: Event) -> int:
        name = event._message.topic.name
        channels = (key for key, each in self._found.items() if each.decoder.topic.name == name)
        return next(channels, 0)

    def describe(self) -> None:
        """Learn of new channels, and of new tables of the known ones.

        The ids that are read of a known channel stay as they are. Otherwise a change that came
        through two channels could be read from both, or from neither.
        """
        known, found = (
            self._found,
            self._decoders_of(read_described(self._log.consumer), self._cast),
        )
        self._found = {**known, **found} | {
            key: replace(known[key], relations=found[key].relations)
            for key in known.keys() & found.keys()
        }
        self._hooks.described()

    def decode(self, rows: Sequence[Any], since: datetime) -> Iterator[Message | Gap]:
        """See MessageDecoder.

        Anybody may make a trigger at any time, also for another table. Its channel is described
        before it writes, so that a description read after the rows knows the table of each row.
        """
        described = False
        for row in rows:
            found = self._found.get(row.channel)
            known = found is not None and found.owns(row)
            if not (known or described) and (
                row.channel in self._own if found is None else found.wants(row)
            ):
                self.describe()
                described = True
                found = self._found.get(row.channel)
            if found is None or not found.wants(row):
                continue
            if not (known or found.owns(row)):
                self._hooks.foreign[row.relation] += 1
                continue
            decoded = self._decode(found.decoder, row, since)
            if decoded is not None:
                yield decoded

    def _decode(self, decoder: Decoder, row: Row, since: datetime) -> Message | Gap | None:
        try:
            message = decoder.decode(row.payload)
        except PayloadError as error:
            self._hooks.refuse()
            detail = f"the message at {row.position} cannot be read: {error}"
            log.error("%s", detail, extra=decoder.topic.fields)
            # A Gap, unlike for a NOTIFY, which anybody may send: only triggers write to the log.
            return Gap(since, self._hooks.now(), "watcher_broken", detail)
        if isinstance(message, Broken):
            log.error("a watcher is broken: %s", message.error, extra=decoder.topic.fields)
            return self._hooks.failure(message)
        if not isinstance(message, Message):
            return None
        message.position = row.position
        if self._keeps:
            message.payload = row.payload
        return message
