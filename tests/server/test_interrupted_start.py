"""A start that Ctrl-C ends."""

from __future__ import annotations

import itertools
import threading

import pytest

from pgsignals import Hub, watch
from pgsignals.hub.hub import Delivery
from tests.conftest import Database


class Interrupted(threading.Event):
    """What says that a thread runs: whoever waits for it is interrupted, the first time."""

    def wait(self, timeout: float | None = None) -> bool:
        if not hasattr(self, "waited"):
            self.waited = True
            raise KeyboardInterrupt
        return super().wait(timeout)


def test_whichever_thread_begins(
    dsn: str, db: Database, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets its KeyboardInterrupt, whichever thread begins then, and can start again."""
    db("CREATE TABLE users (id serial PRIMARY KEY)")
    start = threading.Thread.start
    started = itertools.count()

    def interrupted(number: int, thread: threading.Thread) -> None:
        # Ctrl-C is for the main thread; others may begin threads, too, such as a watch's timers.
        ours = threading.current_thread() is threading.main_thread()
        if ours and next(started) == number:
            vars(thread)["_started"] = Interrupted()
        start(thread)

    hub = Hub()
    for number in itertools.count():
        started = itertools.count()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", lambda t, n=number: interrupted(n, t))
            try:
                hub.start(dsn, [watch("users", "inserted")], delivery=delivery, workers=2)
            except KeyboardInterrupt:
                continue
            break
    assert number > 3
    with hub:
        assert hub.health().alive
