"""Looks after the end of the process, and its forks, for all Hubs that run in it.

Python calls hooks in the child of a fork that it has made itself. A fork in C, as uWSGI makes them,
calls none: code that a fork concerns therefore calls :func:`notice_fork` first.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

log = logging.getLogger("pgsignals")

_EXIT_SECONDS = 5.0


class Running(Protocol):
    """An object that has threads and connections while the process lives."""

    def _exit(self, timeout: float) -> object:
        """End with the process, and give receivers ``timeout`` seconds for what has arrived."""

    def _forked(self, restarting: bool = True) -> None:
        """Forget the parent's threads, in the child of a fork, and leave its connections alone.

        If not ``restarting``, since the child is about to end, nothing may start by itself.
        """


_running: weakref.WeakSet[Running] = weakref.WeakSet()
_calls: list[Callable[[], object]] = []

# The process that all of this belongs to, and the one that has begun to take it over.
_process = _heir = os.getpid()
_locks: dict[int, threading.RLock] = {}


def guard(running: Running) -> None:
    """Stop ``running`` at the process's end, within five seconds for all, and tell it of forks."""
    notice_fork()
    _running.add(running)
    _guard_process()


def after_fork(call: Callable[[], object]) -> None:
    """Make ``call`` in the child of each fork, before Hubs are told."""
    _calls.append(call)
    _hook_forks()


def notice_fork() -> None:
    """Do what the hooks do, in the child of a fork that has called none.

    Code that may be asked for something that a fork has changed calls this first. It returns once
    that is put right, whichever thread does it.
    """
    if os.getpid() != _process:
        _inherit()


def _inherit(restarting: bool = True) -> None:
    global _process, _heir
    process = os.getpid()
    # One lock for each process, since that of the parent may be held here for ever.
    with _locks.setdefault(process, threading.RLock()):
        if _heir == process:
            return
        _heir = process
        for call in _calls:
            call()
        for each in list(_running):
            each._forked(restarting)
        _process = process


def forks_workers() -> bool:
    """Whether this is a server that forks its workers, which then are to hear events."""
    return any(name in sys.modules for name in _FORKING_SERVERS)


# The children of other programs, of multiprocessing say, mostly do something else.
_FORKING_SERVERS = ("gunicorn.arbiter", "celery.concurrency.prefork", "uwsgi", "pyuwsgi")


@functools.cache
def _guard_process() -> None:
    atexit.register(_stop_at_exit)
    _hook_forks()
    _hook_uwsgi()


@functools.cache
def _hook_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_inherit)


def _hook_uwsgi() -> None:
    """Make each worker of a uWSGI master take over at once, and not only when it is first asked."""
    # Not by an import: outside of uWSGI, a module of that name may be anything.
    uwsgi: Any = sys.modules.get("uwsgi")
    if not callable(getattr(uwsgi, "masterpid", None)):
        return
    if not getattr(uwsgi, "has_threads", True):
        log.error(
            "uWSGI runs no threads here, so that no event will arrive: set enable-threads or "
            "threads in its configuration"
        )
    if not uwsgi.masterpid():
        return
    former = getattr(uwsgi, "post_fork_hook", None)
    # Some distributions have uwsgidecorators in a package of its own.
    with contextlib.suppress(ImportError):
        # The import puts its own hook in the place of any other.
        decorators: Any = importlib.import_module("uwsgidecorators")
        decorators.postfork(notice_fork)
        if former is not None and former is not decorators.postfork_chain_hook:
            decorators.postfork(former)


def _stop_at_exit() -> None:
    if os.getpid() != _process:
        _inherit(restarting=False)
    deadline = time.monotonic() + _EXIT_SECONDS
    for each in list(_running):
        each._exit(max(0.0, deadline - time.monotonic()))
