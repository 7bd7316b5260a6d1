"""The protocols between a source and the sink that it gives its messages to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.events import Gap, Message


class Sink(Protocol):
    """Takes the messages of a source. None of its methods runs the user's code."""

    @property
    def full(self) -> bool:
        """Whether the source should stop reading for now."""

    @property
    def idle(self) -> bool:
        """Whether there are receivers that wait for the source."""

    def submit(self, message: Message) -> None:
        """Take a message."""

    def wait_for_room(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until the source may read on; return whether it may."""

    def give_up(self) -> None:
        """Stop being full: drop, and announce, the events for receivers that are too slow."""

    def reached(self, marker: str) -> None:
        """Take note that all that was committed before the marker has been submitted."""

    def gap(self, gap: Gap) -> None:
        """Tell the receivers of a Gap, before anything that is submitted later."""

    def connected(self) -> None:
        """Tell the receivers that events can arrive from now on."""

    def disconnected(self, error: BaseException) -> None:
        """Tell the receivers that the connection is lost."""


@dataclass(frozen=True)
class Wanted:
    """A table and operations that somebody listens to; without ``schema``, in any schema."""

    table: str
    schema: str | None
    ops: tuple[str, ...]


class RemoteSink(Protocol):
    """Takes the events of a source that reads from a broker. No method runs the user's code."""

    @property
    def full(self) -> bool:
        """Whether the source should stop reading for now; what is not read waits at the broker."""

    def wait_for_room(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until the source may read on; return whether it may."""

    def receive(
        self,
        attributes: Mapping[str, str],
        data: bytes | None,
        *,
        position: str | None = None,
        redelivered: bool = False,
    ) -> None:
        """Take a CloudEvent of any content, its attributes without the protocol's prefix.

        ``position`` is the event's at the broker.
        """

    def settle(self, call: Callable[[], None]) -> None:
        """Make ``call`` once the receivers have returned from all that came before.

        With a name, receivers that raise are called again first. ``call`` is made in another thread
        and must return at once: it is the place to note what can be acknowledged now.
        """

    def gap(self, gap: Gap) -> None:
        """Tell the receivers of a Gap, before anything that comes later."""

    def connected(self) -> None:
        """Tell the receivers that events can arrive from now on."""

    def disconnected(self, error: BaseException) -> None:
        """Tell the receivers that the connection is lost."""


class RemoteSource(Protocol):
    """Reads events from a broker in a thread of its own (a plugin of ``pgsignals_source``).

    Its text, ``str(source)``, names the place that it reads from, without a password.
    """

    @property
    def is_connected(self) -> bool:
        """Whether it is reading now."""

    @property
    def is_alive(self) -> bool:
        """Whether its thread goes on, if only to connect again."""

    def start(self, wanted: Sequence[Wanted], name: str | None, sink: RemoteSink) -> None:
        """Connect, raising BrokerError for what is wrong, and read in the background from then on.

        With a ``name``, all sources of that name share the events, which are acknowledged once
        receivers have returned, so that the next source goes on there. Without one, the source gets
        all events from now on. It may feed more events than are wanted.
        """

    def refuse(self, position: str, reason: str) -> None:
        """Tell the broker, as far as it wants to know, that a receiver could not take an event.

        Called from any thread, before the event is settled like all others: the event must not come
        again. ``position`` is the one that ``receive`` was given.
        """

    def stop(self, timeout: float) -> None:
        """Read no more, waiting at most ``timeout`` seconds; acknowledging goes on."""

    def close(self, timeout: float) -> None:
        """Acknowledge what has been settled, then give everything back; called after ``stop``."""

    def abandon(self) -> None:
        """Give up what is inherited, in the child of a fork, and leave the parent's be."""
