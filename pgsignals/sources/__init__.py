"""Where messages come from: the protocols between a source and what it feeds."""

from __future__ import annotations

from typing import Protocol

from ..events import Gap, Message


class Sink(Protocol):
    """What a source feeds. None of its methods runs code of the user's."""

    @property
    def full(self) -> bool:
        """Whether the source should stop reading for now."""

    @property
    def idle(self) -> bool:
        """Whether there are receivers that wait for the source."""

    def submit(self, message: Message) -> None:
        """Take a message."""

    def wait_for_room(self, timeout: float) -> bool:
        """Wait for at most ``timeout`` seconds until the source may read on; whether it may."""

    def give_up(self) -> None:
        """Be full no more: lose, and announce, what is for receivers that are too slow."""

    def reached(self, marker: str) -> None:
        """Take note that all that was committed before the marker has been submitted."""

    def gap(self, gap: Gap) -> None:
        """Tell the receivers of a Gap, before anything that is submitted later."""

    def connected(self) -> None:
        """Tell the receivers that events can arrive from now on."""

    def disconnected(self, error: BaseException) -> None:
        """Tell the receivers that the connection is lost."""


class Source(Protocol):
    """Reads messages from somewhere in a thread of its own."""

    def start(self) -> None:
        """Connect, raising what is wrong, and read in the background from then on."""

    def stop(self, timeout: float) -> None:
        """Stop reading and give everything back, waiting at most ``timeout`` seconds."""
