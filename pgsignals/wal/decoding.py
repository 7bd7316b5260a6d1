"""Decodes what the write-ahead log brings: messages of triggers, and changes of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from typing import cast

from ..consumers.decoding import ChannelDecoder, RowDecoder
from ..consumers.log import Log
from ..core.events import Gap, Message
from ..core.logging import log
from ..core.payload import Broken, Cast, decode_context
from ..core.rows import RowsDecoder
from ..triggers.definitions import Definition
from .log import WalLog
from .reader import Entry, Run

# What runs have in common that can be read together.
_LIKENESS = attrgetter("kind", "context", "foreign")


class WalDecoder(RowDecoder):
    """Decodes entries of the write-ahead log, by the channels that say how."""

    def begin(self, log: Log, definitions: Sequence[Definition], cast: Cast) -> None:
        assert isinstance(log, WalLog)
        self._wal = log
        log.refuse = self._hooks.refuse
        super().begin(log, definitions, cast)
        self._index()

    def describe(self) -> None:
        super().describe()
        self._index()

    def _index(self) -> None:
        """Note by which channels the rows of each table are read."""
        self._by_relation: dict[int, list[ChannelDecoder]] = {}
        for each in self._found.values():
            if isinstance(each.decoder, RowsDecoder):
                each.decoder.read_in(self._wal.encoding)
                for relation in each.relations:
                    self._by_relation.setdefault(relation, []).append(each)
        self._wal.wanted = self._by_relation.keys()
        self._wal.unknown = self.describe

    def decode(self, found: Sequence[Entry], since: datetime) -> Iterator[Message | Gap]:
        for kind, entries in groupby(found, type):
            if kind is not Run:
                yield from super().decode([*entries], since)
                continue
            for _, runs in groupby(cast("Iterator[Run]", entries), _LIKENESS):
                yield from self._decode_alike([*runs])

    def _decode_alike(self, runs: Sequence[Run]) -> Iterator[Message | Gap]:
        """Decode runs that are alike: single rows of many transactions, mostly."""
        together = self._together(runs) if len(runs) > 1 else None
        if together is None:
            for run in runs:
                yield from self.decode_run(run)
            return
        # As the transactions committed, whatever watchers they concern.
        for messages in zip(*together, strict=True):
            yield from messages

    def _together(self, runs: Sequence[Run]) -> list[Sequence[Message]] | None:
        """Return the messages of all runs for each watcher; None if they do not go together."""
        first, last = runs[0], runs[-1]
        context = decode_context(first.context)
        found: list[Sequence[Message]] = []
        for each in self._by_relation.get(first.relation, ()):
            decoder = each.decoder
            assert isinstance(decoder, RowsDecoder)
            if decoder.topic.op != first.op:
                continue
            messages = decoder.together(runs, context) if each.takes(first, last) else None
            if messages is None:
                return None
            found.append(messages)
        return found

    def decode_run(self, run: Run) -> Iterator[Message | Gap]:
        context = decode_context(run.context)
        foreign = False
        for each in self._by_relation.get(run.relation, ()):
            decoder = each.decoder
            assert isinstance(decoder, RowsDecoder)
            if decoder.topic.op != run.op or not each.wants(run):
                continue
            if not each.owns(run):
                foreign = True
                continue
            for message in decoder.messages(run, context):
                if isinstance(message, Broken):
                    log.error("a watcher is broken: %s", message.error, extra=decoder.topic.fields)
                    yield self._hooks.failure(message)
                else:
                    yield message
        if foreign:
            self._hooks.foreign[run.relation] += max(1, len(run.data))
