"""The messages up to which a stream has been read, and receivers have come."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone

from nats.aio.msg import Msg
from nats.js.api import ConsumerInfo

from pgsignals import Gap

from .history import History

EPOCH = datetime.fromtimestamp(0, timezone.utc)


class Progress:
    """The sequence numbers of a stream that were read and settled.

    The numbers mean nothing in a stream that came in the place of this one: ``generation`` counts
    the streams, and messages that were read of a former one are not acknowledged any more.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.history = History()
        # The last message of the stream that has been read, or was none of ours; and where the
        # stream ended when it was last looked at.
        self.floor = self.end = 0
        # The point up to which all sources of the name were done, when that was last looked at.
        self.acknowledged = 0
        # The first message that was skipped, while it is not known if it is there and not ours.
        self._skipped: int | None = None
        # The time before which no stored message is missing.
        self.heard = EPOCH
        # The time from which on a stream that came in the place of another one is to be read.
        self.anew: datetime | None = None
        self.unsettled: dict[int, Msg] = {}
        # Messages that must not come again though no receiver could take them, and why.
        self.refused: dict[int, str] = {}

    def begin_anew(self) -> None:
        """Forget the sequence numbers of a stream that is not there any more."""
        held = (message.metadata.timestamp for message in self.unsettled.values())
        self.anew = min((self.heard, *held))
        self.history = History()
        self.generation += 1
        self.floor = self.end = self.acknowledged = 0
        self._skipped = None
        self.unsettled.clear()
        self.refused.clear()

    def begin_after(self, last: int) -> None:
        """Take all messages up to ``last`` for read and acknowledged."""
        self.floor = self.end = self.acknowledged = last

    def begin_behind(self, info: ConsumerInfo, last: int) -> None:
        """Take the messages that a consumer has behind it for read."""
        self.acknowledged = info.ack_floor.stream_seq if info.ack_floor is not None else 0
        idle = not info.num_pending and not info.num_ack_pending
        self.floor = last if idle else self.acknowledged

    def first_unsettled(self, *, shared: bool) -> int:
        """Return the first message that may come again; if ``shared``, others may have it."""
        if shared:
            return self.acknowledged + 1
        return min((*self.unsettled, self.floor + 1))

    def saw(self, message: Msg, headers: Mapping[str, str]) -> int:
        """Note that a message was read; return its sequence number."""
        sequence = message.metadata.sequence.stream
        if sequence > self.floor + 1 and self._skipped is None:
            self._skipped = self.floor + 1
        self.floor = max(self.floor, sequence)
        self.heard = max(self.heard, message.metadata.timestamp)
        self.history.saw(sequence, headers)
        self.unsettled[sequence] = message
        return sequence

    def looked(self, info: ConsumerInfo, last: int) -> None:
        """Note where the consumer and the stream's end are."""
        delivered = info.delivered.stream_seq if info.delivered is not None else 0
        # A message that another member of the name has, or nobody wants, is not lost to us.
        self.floor = max(self.floor, delivered if info.num_pending else self.end)
        self.end = last
        if info.ack_floor is not None:
            self.acknowledged = info.ack_floor.stream_seq

    def lost(self, stream: str, first: int) -> Gap | None:
        """Return a Gap if the stream's first message is behind the one that was next."""
        expected, self._skipped = self._skipped or self.floor + 1, None
        if first <= expected:
            return None
        detail = f"the stream {stream} begins at {first}, and {expected} was next"
        self.floor = max(self.floor, first - 1)
        return Gap(self.heard, self.heard, "retention", detail)
