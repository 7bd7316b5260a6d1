"""A time limit for the awaitables that a coroutine waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Awaitable[T]) -> T:
    """Return what ``work`` returns, or cancel it after so many seconds and raise TimeoutError.

    Before Python 3.12, asyncio.wait_for() swallows a cancellation that comes when the work has just
    ended: a task that was told to end goes on for ever.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        timed_out = not task.done()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # Its error counts as seen, also if a cancellation ends this function.
    if timed_out and task.cancelled():
        raise asyncio.TimeoutError
    return task.result()
