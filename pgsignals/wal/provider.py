"""Makes the log and the decoder with which a durable source reads the write-ahead log."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from psycopg2.extensions import cursor as Cursor

from ..consumers.channels import Described
from ..consumers.decoding import ChannelDecoder
from ..consumers.log import DecoderHooks
from ..core.payload import Cast
from ..postgres.session import Session
from .decoding import WalDecoder
from .log import WalLog
from .privileges import missing_grants
from .slots import slot_name
from .stream import ReplicationStream


class WalProvider(ABC):
    """Makes logs over the write-ahead log, and their decoders: see LogProvider."""

    @property
    @abstractmethod
    def session_dsn(self) -> str:
        """The connection string of the sessions that read."""

    @property
    @abstractmethod
    def ephemeral(self) -> bool:
        """Whether the consumers end with this process."""

    @property
    @abstractmethod
    def lease(self) -> float:
        """After how many seconds a process that hangs loses what it reads."""

    @abstractmethod
    def decoders(self, channels: Sequence[Described], cast: Cast) -> Mapping[int, ChannelDecoder]:
        """Return a decoder for each channel that a watcher reads."""

    def log_class(self) -> type[WalLog]:
        """Return the class of the logs."""
        return WalLog

    def log(self, session: Session, consumer: str, holder: str, timeout: float) -> WalLog:
        [(database,)] = session.execute("SELECT pg_catalog.current_database()", timeout=timeout)
        # The slot of a session that was lost may live on for a while: another try needs another.
        suffix = secrets.token_hex(4) if self.ephemeral else ""
        return self.log_class()(
            session,
            ReplicationStream(self.session_dsn, session.waiter, session.cancelled),
            consumer,
            holder,
            timeout,
            slot=slot_name(database, consumer + suffix),
            temporary=self.ephemeral,
            lease=self.lease,
        )

    def decoder(self, hooks: DecoderHooks) -> WalDecoder:
        return WalDecoder(self.decoders, hooks, keeps=True)

    def missing_grants(self, cursor: Cursor) -> list[str]:
        return missing_grants(cursor)
