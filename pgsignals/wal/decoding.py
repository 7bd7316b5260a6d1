"""Decodes what the write-ahead log brings: messages of triggers, and changes of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from ..consumers.decoding import ChannelDecoder, RowDecoder
from ..consumers.log import Log
from ..core.events import Gap, Message
from ..core.logging import log
from ..core.payload import Broken, Cast, decode_context
from ..core.rows import RowsDecoder
from ..triggers.definitions import Definition
from .log import WalLog
from .lsn import lsn_text
from .reader import Entry, Run


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
        for entry in found:
            if isinstance(entry, Run):
                yield from self.decode_run(entry)
            else:
                yield from super().decode([entry], since)

    def decode_run(self, run: Run) -> Iterator[Message | Gap]:
        context = decode_context(run.context) if run.context else {}
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
                    message.position = lsn_text(run.id)
                    yield message
        if foreign:
            self._hooks.foreign[run.relation] += max(1, len(run.data))
