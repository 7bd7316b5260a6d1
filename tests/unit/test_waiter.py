"""A Waiter waits for one descriptor, beside any that are watched, or for one alone."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pgsignals.postgres.waiter import Waiter
from tests.waiting import DEADLINE

Pair = tuple[socket.socket, socket.socket]
SHORT = 0.05


@pytest.fixture(params=["poll", "selector"])
def waiter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiter]:
    """A waiter, on a platform with poll() and on one without."""
    if request.param == "selector":
        monkeypatch.delattr(select, "poll")
    made = Waiter()
    yield made
    made.close()


def pairs() -> Iterator[Pair]:
    """Two sockets, of which the second can be read when the first has sent."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


main = pytest.fixture(pairs, name="main")
beside = pytest.fixture(pairs, name="beside")


def lasts(call: Callable[[], object]) -> bool:
    """Whether a wait of SHORT seconds lasts that long."""
    began = time.monotonic()
    call()
    return time.monotonic() - began >= SHORT


def test_a_watched_descriptor_ends_a_wait(waiter: Waiter, main: Pair, beside: Pair) -> None:
    """It ends the wait for another descriptor, which is not said to be readable, or for none."""
    waiter.watch(beside[1].fileno())
    beside[0].send(b"x")
    assert waiter.wait(main[1].fileno(), DEADLINE) is False
    assert waiter.wait(None, DEADLINE) is False
    main[0].send(b"x")
    assert waiter.wait(main[1].fileno(), DEADLINE) is True


def test_watching_is_undone(waiter: Waiter, main: Pair, beside: Pair) -> None:
    """Watching twice is watching once, and what is watched no more ends no wait."""
    number = beside[1].fileno()
    waiter.unwatch(number)
    waiter.watch(number)
    waiter.watch(number)
    waiter.unwatch(number)
    waiter.unwatch(number)
    beside[0].send(b"x")
    assert lasts(lambda: waiter.wait(main[1].fileno(), SHORT))
    waiter.watch(number)
    assert waiter.wait(main[1].fileno(), DEADLINE) is False


def test_forgetting_leaves_what_is_watched(waiter: Waiter, main: Pair, beside: Pair) -> None:
    """The descriptor that was given to wait is forgotten alone."""
    waiter.watch(beside[1].fileno())
    waiter.wait(main[1].fileno(), 0.0)
    waiter.forget()
    beside[0].send(b"x")
    assert waiter.wait(None, DEADLINE) is False


def test_nothing_else_ends_a_wait_alone(waiter: Waiter, main: Pair, beside: Pair) -> None:
    """Neither what is watched nor what was given to wait ends it, or a sleep."""
    waiter.watch(beside[1].fileno())
    waiter.wait(main[1].fileno(), 0.0)
    beside[0].send(b"x")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert lasts(lambda: waiter.wait_alone(other.fileno(), SHORT))
        assert lasts(lambda: waiter.sleep(SHORT, lambda: False))
    waiter.wait_alone(beside[1].fileno(), None)
    waiter.wait_alone(main[1].fileno(), None, write=True)
    # It has watched nothing that it would go on watching.
    assert waiter.wait(main[1].fileno(), DEADLINE) is False
    main[0].send(b"x")
    waiter.wait_alone(main[1].fileno(), None)
    assert waiter.wait(main[1].fileno(), DEADLINE) is True


def test_a_wake_up_ends_any_wait(waiter: Waiter, main: Pair) -> None:
    """One that came before the wait, or comes during it, ends it once."""
    waiter.wake()
    assert waiter.wait(main[1].fileno(), DEADLINE) is False
    waiter.wake()
    waiter.wait_alone(main[1].fileno(), DEADLINE)
    assert lasts(lambda: waiter.wait_alone(main[1].fileno(), SHORT))
    thread = threading.Thread(target=waiter.wake)
    thread.start()
    waiter.wait_alone(None, None)
    thread.join()
    assert lasts(lambda: waiter.wait(None, SHORT))
