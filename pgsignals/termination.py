"""SIGTERM and SIGINT, for whoever waits for the program's end."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_former: dict[int, Any] = {}


@contextmanager
def termination(call: Callable[[], object]) -> Iterator[None]:
    """Have ``call`` made, in the main thread, for each SIGTERM and SIGINT during the block.

    It interrupts whatever the main thread does, so that it must take no lock. A signal that the
    process ignores (nohup, a shell's background job) stays ignored. Only for the main thread.
    """
    _guard_forks()
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not signal.SIG_IGN:
            _former[number] = handler
            signal.signal(number, lambda number, frame: call())
    try:
        yield
    finally:
        _restore()


def _restore() -> None:
    while _former:
        number, handler = _former.popitem()
        # None stands for a handler that Python did not set and cannot set again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@functools.cache
def _guard_forks() -> None:
    """A child that a receiver forks must end at SIGTERM: nobody waits there to be told of it."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_restore)
