"""Looks after the end of the process, and its forks, for all Hubs that run in it."""

from __future__ import annotations

import atexit
import functools
import os
import time
import weakref
from typing import Protocol

_EXIT_SECONDS = 5.0


class Running(Protocol):
    """What has threads and connections while the process lives."""

    def stop(self, timeout: float) -> object:
        """End, and let receivers handle for ``timeout`` seconds what has arrived."""

    def _forked(self) -> None:
        """In the child of a fork: forget the parent's threads, and leave its connections alone."""


_running: weakref.WeakSet[Running] = weakref.WeakSet()


def guard(running: Running) -> None:
    """Stop it when the process ends, with five seconds for all of them, and tell it of forks."""
    _running.add(running)
    _guard_process()


@functools.cache
def _guard_process() -> None:
    atexit.register(_stop_at_exit)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork_in_child)


def _stop_at_exit() -> None:
    deadline = time.monotonic() + _EXIT_SECONDS
    for each in list(_running):
        each.stop(max(0.0, deadline - time.monotonic()))


def _after_fork_in_child() -> None:
    for each in list(_running):
        each._forked()
