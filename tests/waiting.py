"""Waiting for what only asking tells, with a deadline that only a failure reaches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pgsignals
from pgsignals.testing import EventLog

# Seconds after which a test gives up: a busy machine is slow, and only a failure waits for it.
DEADLINE = 60.0

T = TypeVar("T")


def eventually(ask: Callable[[], T], right: Callable[[T], bool], timeout: float = DEADLINE) -> T:
    """Ask until the answer is right, and return it."""
    deadline, pause = time.monotonic() + timeout, threading.Event()
    while not right(answer := ask()):
        assert time.monotonic() < deadline, f"it is still {answer!r}"
        pause.wait(0.02)
    return answer


def settle(hub: pgsignals.Hub, timeout: float = DEADLINE) -> None:
    """Wait until the receivers of a Hub have handled all that is committed by now."""
    EventLog(hub).settle(timeout)
