"""The server's side of a source: a durable consumer of a name, or one of its own."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Iterable
from datetime import datetime

import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy, StreamInfo

from pgsignals import Gap

from .options import Options
from .progress import Progress

log = logging.getLogger("pgsignals.nats")

_ACK_SECONDS = 30.0
# Messages that receivers may have at a time.
MOST = 10_000
# A consumer without a name is forgotten by the server when nobody has read for so long.
_FORGOTTEN_SECONDS = 300.0


class Consumer:
    """Finds the consumer, or makes it, at the place where reading is to begin."""

    def __init__(
        self, options: Options, name: str | None, filters: Iterable[str], progress: Progress
    ) -> None:
        self._options = options
        self.durable = None if name is None else _consumer_name(name)
        self._filters = sorted(filters)
        self._progress = progress
        self.name = ""
        # A consumer that is made anew by somebody else may begin elsewhere.
        self._created: datetime | None = None

    def adopt(self, info: ConsumerInfo) -> None:
        """Read by this consumer from now on."""
        self.name, self._created = info.name, info.created

    def is_other(self, info: ConsumerInfo) -> bool:
        """Whether the consumer is not the one that was read by."""
        return info.created != self._created

    async def find(
        self, jetstream: JetStreamContext, stream: StreamInfo
    ) -> tuple[ConsumerInfo, Gap | None]:
        """Return the consumer, and a Gap if it does not go on where reading was."""
        progress = self._progress
        again, last = progress.history.known, stream.state.last_seq
        if (info := await self._find_known(jetstream)) is not None:
            if not again:
                progress.begin_behind(info, last)
            elif self.is_other(info) and _beginning(info) > self._first_unsettled:
                why = f"somebody made the consumer {info.name} anew, at {_beginning(info)}"
                return info, Gap(progress.heard, progress.heard, "unknown_name", why)
            return info, None
        config = ConsumerConfig(
            durable_name=self.durable,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=_ACK_SECONDS,
            max_ack_pending=MOST,
            filter_subjects=self._filters,
            inactive_threshold=None if self.durable else _FORGOTTEN_SECONDS,
        )
        gap = None
        if again:
            # The new consumer goes on where the former one was.
            config.opt_start_seq = self._first_unsettled
        elif progress.anew is not None:
            # A backup has brought back older messages.
            config.deliver_policy = DeliverPolicy.BY_START_TIME
            config.opt_start_time = progress.anew
            progress.floor = stream.state.first_seq - 1
        else:
            config.opt_start_seq = last + 1
            progress.begin_after(last)
            if self.durable is not None:
                # Nobody knows how far a former consumer of this name had come.
                why = f"the consumer {self.durable} was not there, and begins at {last + 1}"
                gap = Gap(progress.heard, progress.heard, "unknown_name", why)
        return await jetstream.add_consumer(self._options.stream_name, config), gap

    @property
    def _first_unsettled(self) -> int:
        return self._progress.first_unsettled(shared=self.durable is not None)

    async def _find_known(self, jetstream: JetStreamContext) -> ConsumerInfo | None:
        name = self.durable or self.name
        if not name:
            return None
        stream = self._options.stream_name
        try:
            info: ConsumerInfo = await jetstream.consumer_info(stream, name)
        except nats.js.errors.NotFoundError:
            log.debug("%s: there is no consumer %s, making it", self._options, name)
            return None
        if sorted(info.config.filter_subjects or ()) != self._filters:
            return await jetstream.add_consumer(
                stream, info.config, filter_subjects=self._filters, filter_subject=None
            )
        return info


def _beginning(info: ConsumerInfo) -> int:
    """Return the first message that a consumer may have been given."""
    if info.config.deliver_policy == DeliverPolicy.ALL:
        return 0
    if info.config.deliver_policy == DeliverPolicy.BY_START_SEQUENCE:
        return info.config.opt_start_seq or 0
    return sys.maxsize  # The configuration does not say.


def _consumer_name(name: str) -> str:
    """Return the durable's name: forbidden characters are replaced, and a hash tells apart."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)}-{digest}"
