"""Coroutine functions as receivers: a worker runs one on an event loop, and waits for its end."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from ..core.errors import StateError
from ..core.logging import error_info, log

# How often a waiting worker looks whether the loop was closed, of which it is not told.
_LOOK_SECONDS = 0.25

_inside: contextvars.ContextVar[_Call | None] = contextvars.ContextVar(
    "pgsignals_inside", default=None
)


class LeftBehind(StateError):
    """A call that was not made or not waited for, since the Hub was stopped by its event loop.

    It is raised, so that durable delivery does not take the event for handled.
    """


class _Call:
    """One call of a coroutine function that a worker waits for."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.active = True
        self.stops = False
        self.exit: SystemExit | None = None


class Coroutines:
    """Runs coroutine functions on the loop of a Hub for threads that wait for them.

    A worker takes the next event only when the coroutine has ended, so that receivers keep their
    order, and a slow coroutine makes the queue grow like any slow receiver.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._simulated = False
        self._lock = threading.Lock()
        self._calls: set[_Call] = set()
        self._left = False
        self.dropped = 0

    def begin(self, loop: asyncio.AbstractEventLoop | None, simulated: bool = False) -> None:
        """Use ``loop`` from now on; if it is None, the loop that runs in this thread.

        ``simulated``: without a loop, each call gets one of its own.
        """
        self._loop = _running() if loop is None else loop
        self._simulated = simulated
        self._left = False
        self.dropped = 0

    @property
    def ready(self) -> bool:
        """Whether there is a loop to run on."""
        return self._simulated or self._loop is not None

    @property
    def waits_in_vain(self) -> bool:
        """Whether a worker waits for a coroutine whose loop does not run."""
        loop = self._loop
        return bool(self._calls) and loop is not None and not loop.is_running()

    def forked(self) -> None:
        """In the child of a fork, forget the calls: nobody waits, and the lock may be held."""
        self._lock = threading.Lock()
        self._calls = set()

    def call(self, fn: Callable[..., Coroutine[Any, Any, object]], argument: object) -> object:
        """Run ``fn(argument)`` on the loop and wait for its end; raises what it raises.

        Raises LeftBehind at once when ``leave`` was called, or is during the wait, and StateError
        for a loop that is closed.
        """
        loop = self._loop
        if loop is None and self._simulated and _running() is None:
            return asyncio.run(_as_coroutine(fn, argument))
        if loop is None or _running() is not None:
            raise StateError(
                "A coroutine receiver cannot be waited for in the thread of an event loop: emit "
                "with `await asyncio.to_thread(simulation.emit, …)`."
            )
        if loop.is_closed():
            raise StateError(_CLOSED)
        call = _Call()
        with self._lock:
            if self._left:
                self.dropped += 1
                raise LeftBehind(_LEFT)
            self._calls.add(call)
        try:
            return self._wait(loop, call, fn, argument)
        finally:
            with self._lock:
                self._calls.discard(call)

    def _wait(
        self,
        loop: asyncio.AbstractEventLoop,
        call: _Call,
        fn: Callable[..., Coroutine[Any, Any, object]],
        argument: object,
    ) -> object:
        async def run() -> object:
            _inside.set(call)
            try:
                return await fn(argument)
            # Passed on to the worker: raised here, it would end the loop, and all that runs there.
            except SystemExit as error:
                call.exit = error
                return None
            finally:
                call.active = False

        # The coroutine runs in a copy of this context, which has the span that a tracer has begun.
        coroutine = run()
        try:
            future: Future[object] = asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError as error:
            coroutine.close()
            raise StateError(_CLOSED) from error
        future.add_done_callback(lambda _: call.over.set())
        while not call.over.wait(_LOOK_SECONDS):
            if loop.is_closed():
                coroutine.close()
                raise StateError(_CLOSED)
        if not future.done():
            with self._lock:
                self.dropped += not call.stops
            future.add_done_callback(functools.partial(_report_late, fn))
            raise LeftBehind(_LEFT)
        # Not by result(), which asks the error for its truth, and passes over one that is false.
        if (raised := future.exception()) is not None:
            raise raised
        if call.exit is not None:
            raise call.exit
        return future.result()

    def in_the_way(self) -> bool:
        """Whether the caller keeps coroutine receivers from ending while it waits for them.

        It does if it is in the loop's own thread, or is itself one of these receivers.
        """
        running = _running()
        return self._inside() or (running is not None and running is self._loop)

    def leave(self) -> None:
        """Wait for no call any more: calls under way go on alone, those to come are dropped."""
        if self._inside() and (own := _inside.get()) is not None:
            own.stops = True
        with self._lock:
            self._left = True
            for call in self._calls:
                call.over.set()

    def _inside(self) -> bool:
        call = _inside.get()
        return call is not None and call.active and call in self._calls


_LEFT = (
    "stop() was called in the thread of the event loop, where coroutine receivers cannot be waited "
    "for: use `await pgsignals.astop()`."
)
_CLOSED = (
    "The event loop of the coroutine receivers is closed: stop the Hub before its loop ends, with "
    "`async with pgsignals.start(…)` or `await pgsignals.astop()`."
)


class CoroutineReceiver:
    """A coroutine function that a thread may call; log lines give it the function's name."""

    def __init__(
        self, fn: Callable[..., Coroutine[Any, Any, object]], coroutines: Coroutines
    ) -> None:
        inner: Any = fn
        while isinstance(inner, functools.partial):
            inner = inner.func
        self.__doc__ = inner.__doc__
        self.__module__ = inner.__module__
        self.__qualname__ = getattr(inner, "__qualname__", type(inner).__qualname__)
        self.__name__ = getattr(inner, "__name__", type(inner).__name__)
        self.fn = fn
        self._coroutines = coroutines

    def __call__(self, argument: object) -> object:
        return self._coroutines.call(self.fn, argument)


def is_coroutine_function(fn: object) -> bool:
    """Whether calling ``fn`` gives a coroutine: a function, a partial, or an object with such."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(type(fn), "__call__", None)  # noqa: B004 - the method is wanted, not an answer
    )


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def _as_coroutine(fn: Callable[..., Coroutine[Any, Any, object]], argument: object) -> object:
    return await fn(argument)


def _report_late(fn: object, future: Future[object]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("%r raised after the Hub was stopped", fn, exc_info=error_info(error))
