"""Makes the log and the decoder with which a durable source reads the outbox."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from psycopg2.extensions import cursor as Cursor

from ..consumers.channels import Described
from ..consumers.decoding import ChannelDecoder, RowDecoder
from ..consumers.log import DecoderHooks
from ..core.payload import Cast
from ..postgres.session import Session
from .log import OutboxLog
from .privileges import missing_grants


class OutboxProvider(ABC):
    """Makes logs over the outbox, and their decoders: see LogProvider."""

    @abstractmethod
    def decoders(self, channels: Sequence[Described], cast: Cast) -> Mapping[int, ChannelDecoder]:
        """Return a decoder for each channel that a watcher reads."""

    def log(self, session: Session, consumer: str, holder: str, timeout: float) -> OutboxLog:
        return OutboxLog(session, consumer, holder, timeout)

    def decoder(self, hooks: DecoderHooks) -> RowDecoder:
        return RowDecoder(self.decoders, hooks)

    def missing_grants(self, cursor: Cursor) -> list[str]:
        return missing_grants(cursor)
