"""A log that is a list: what durable delivery reads is not the outbox's alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, cast

import msgspec

from pgsignals.consumers.backfills.chunks import snapshot_topics
from pgsignals.consumers.consumer_store import Channels, ConsumerStore
from pgsignals.consumers.log import DecoderHooks, Log, Poll, Position
from pgsignals.core.events import Event, Gap, Message
from pgsignals.core.payload import Cast, Decoder
from pgsignals.postgres.session import Session
from pgsignals.triggers import names
from pgsignals.triggers.definitions import Definition

PAGE = 2


@dataclass
class Entries:
    """What was written: a payload of one row each; ``shed`` counts what was left out."""

    payloads: list[str] = field(default_factory=list)
    shed: int = 0

    def write(self, *numbers: int) -> None:
        """Write what one statement would: the rows of these keys."""
        at, index = round(time.time() * 1e6), len(self.payloads)
        rows = "\n".join(map(str, numbers))
        self.payloads.append(f'{{"v":1,"x":1,"s":{index},"t":{at}}}\n{rows}')


@dataclass(frozen=True)
class Index:
    """A position: so many entries have been read."""

    count: int

    @property
    def columns(self) -> Mapping[str, object]:
        return {"last_id": self.count}

    @property
    def whole(self) -> Index:
        return self


class Kept(Message):
    """A message whose payload nobody else holds."""

    text: str = ""

    def row_payload(self, number: int) -> str:
        head, *rows = self.text.split("\n")
        return f"{head}\n{rows[number]}"


class KeptDecoder:
    """Decodes payloads of the log, and those that were kept of it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.topic = decoder.topic

    def decode(self, payload: str) -> Kept:
        message = self._decoder.decode(payload)
        assert isinstance(message, Message)
        return Kept(**msgspec.structs.asdict(message), text=payload)


class IndexReader:
    """Reads the entries from one to a watermark, which is a count of them."""

    def __init__(self, entries: Entries, position: Index, clean: bool) -> None:
        self._entries = entries
        self._doubtful = 0 if clean else len(entries.payloads)
        self._next = self._end = position.count
        self.ahead = position.count > len(entries.payloads)

    @property
    def position(self) -> Index:
        return Index(self._next)

    @property
    def at_end(self) -> bool:
        return self._next == self._end

    @property
    def unsure(self) -> bool:
        return self._next < self._doubtful

    @property
    def lost(self) -> str:
        return ""

    @property
    def replayed_after(self) -> int | None:
        return None

    def start_over(self) -> None:
        self._next = self._end = 0
        self._doubtful = len(self._entries.payloads)

    def read_to(self, watermark: int) -> None:
        if self.at_end:
            self._end = max(self._end, watermark)

    def covers(self, watermark: int) -> bool:
        return self._next >= watermark

    def read(self) -> list[str]:
        return self._entries.payloads[self._next : min(self._end, self._next + PAGE)]

    def doubts(self, message: Message) -> bool:
        return message.sequence < self._doubtful

    def turn(self, rows: Sequence[str]) -> Index:
        self._next += len(rows)
        return self.position


class MemoryLog:
    """The entries as one consumer sees them: see Log."""

    columns: tuple[str, ...] = ("last_id",)
    # What the outbox has of a position must have some value, which its housekeeping reads.
    start: Mapping[str, str] = {
        "last_id": "0",
        "snapshot": "pg_catalog.pg_current_snapshot()::text",
        "floor": "0",
        "shed": "0",
    }
    missed = "false"
    own = "true"
    messages = "(SELECT NULL::bigint AS id, NULL::text AS payload WHERE false)"

    def __init__(
        self, entries: Entries, session: Session, consumer: str, holder: str, timeout: float
    ) -> None:
        self._entries = entries
        self.consumer = ConsumerStore(session, self, consumer, holder, timeout)

    @property
    def marking(self) -> str:
        """How many there are: none is added while a chunk is read."""
        return f"'{len(self._entries.payloads)}'::pg_catalog.text"

    def open(self) -> None: ...

    def surroundings(self) -> tuple[str, datetime]:
        return "list/1", datetime.now(timezone.utc)

    def poll(self) -> Poll:
        return Poll(len(self._entries.payloads), self._entries.shed, time.monotonic())

    def latest(self) -> int:
        return len(self._entries.payloads)

    def acknowledged(self, position: Position) -> None: ...

    def pause(self, worked: float) -> float:
        return 0.01

    def wake(self) -> None: ...

    def stir(self) -> None: ...

    def writers(self) -> None:
        """Nobody writes for longer than a moment."""

    def have_ended(self, writers: None, watermark: int | None = None) -> bool:
        return True

    def position(self, columns: Mapping[str, Any]) -> Index:
        return Index(columns["last_id"])

    def watermark(self, text: str) -> int:
        return int(text)

    def reader(self, position: Index, clean: bool) -> IndexReader:
        return IndexReader(self._entries, position, clean)

    def left(self) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...

    def shed_detail(self, count: int) -> str:
        return f"{count} entries were left out"


class MemoryDecoder:
    """Decodes what the list has, all of it of the first definition: see MessageDecoder."""

    def __init__(self) -> None:
        self.channels = Channels((), 0, ())
        self._decoders: dict[int, Decoder] = {}

    def begin(self, log: Log, definitions: Sequence[Definition], values: Cast) -> None:
        found = {names.channel_key(each.trigger.hash): each.decoder(values) for each in definitions}
        self.channels = Channels([*found], 0, ())
        self._decoders = {key: cast("Decoder", KeptDecoder(each)) for key, each in found.items()}
        # A backfill's.
        self._decoders |= {
            each.channel: each.decoder(values) for each in snapshot_topics(definitions)
        }

    def describe(self) -> None: ...

    def predecessors(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        return {}, {}

    def decoders(self) -> dict[int, Decoder]:
        return self._decoders

    def channel_of(self, event: Event) -> int:
        return self.channels.own[0]

    def decode(self, found: Sequence[str], since: datetime) -> Iterator[Message | Gap]:
        decoder = self._decoders[self.channels.own[0]]
        for payload in found:
            message = decoder.decode(payload)
            assert isinstance(message, Message)
            message.position = str(message.sequence)
            yield message


class MemoryProvider:
    """Has a source read the list: see LogProvider."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries

    def log(self, session: Session, consumer: str, holder: str, timeout: float) -> MemoryLog:
        return MemoryLog(self._entries, session, consumer, holder, timeout)

    def decoder(self, hooks: DecoderHooks) -> MemoryDecoder:
        return MemoryDecoder()
