"""Forks, as gunicorn, multiprocessing and reloaders make them."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from pgsignals.hub.hub import Delivery
from tests.conftest import DEADLINE, Database

PRELUDE = """
import os, sys, threading, time
import psycopg2, pgsignals

dsn = sys.argv[1]

def insert():
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    connection.cursor().execute("INSERT INTO items DEFAULT VALUES")
    connection.close()

def ours():
    return [t.name for t in threading.enumerate() if t.name.startswith("pgsignals")]

def child_ends(work):
    pid = os.fork()
    if pid == 0:
        work()
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status

arrived = threading.Semaphore(0)

def receive(event):
    arrived.release()

def wait():
    assert arrived.acquire(timeout=60)
"""


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")


def run(dsn: str, script: str) -> str:
    """What the script prints."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            PRELUDE + textwrap.dedent(script),
            dsn,
        ],
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_parents_session_survives_the_child(dsn: str) -> None:
    """A child that does nothing, and exits in whatever way, costs its parent nothing."""
    run(
        dsn,
        """
        hub = pgsignals.start(dsn, ["items"])
        pgsignals.on("items")(receive)
        gaps = []
        pgsignals.on_gap(gaps.append)
        lost = []
        pgsignals.disconnected.connect(lambda hub, error: lost.append(error), weak=False)
        import gc
        child_ends(lambda: gc.collect())
        for end in (sys.exit, lambda: pgsignals.stop() and sys.exit()):
            pid = os.fork()
            if pid == 0:
                end()
            os.waitpid(pid, 0)
        insert()
        wait()
        assert not gaps and not lost, (gaps, lost)
        """,
    )


def test_the_child_is_stopped_and_may_start(dsn: str) -> None:
    """In the child the Hub is stopped, has no thread, and start gives it a session of its own."""
    run(
        dsn,
        """
        pgsignals.start(dsn, ["items"])
        pgsignals.on("items")(receive)

        def work():
            assert not pgsignals.default_hub.running
            assert ours() == []
            assert pgsignals.default_hub.wait(0)
            pgsignals.start(dsn, ["items"])
            insert()
            wait()
            pgsignals.stop()

        child_ends(work)
        wait()      # the child's row reaches the parent too
        """,
    )


def test_the_child_may_start_by_itself(dsn: str) -> None:
    """With restart_after_fork the child listens without being told to."""
    run(
        dsn,
        """
        pgsignals.start(dsn, ["items"], restart_after_fork=True)
        pgsignals.on("items")(receive)
        ready = threading.Event()
        pgsignals.connected.connect(lambda hub: os.getpid() != parent and ready.set(), weak=False)
        parent = os.getpid()

        def work():
            assert ready.wait(60)
            insert()
            wait()

        child_ends(work)
        wait()
        """,
    )


def test_a_fork_while_locks_are_held(dsn: str) -> None:
    """Threads that subscribe and stream at the moment of the fork leave no lock behind."""
    run(
        dsn,
        """
        pgsignals.start(dsn, ["items"])
        pgsignals.on_batch("items", every=0)(lambda batch: None)
        done = threading.Event()

        def busy():
            while not done.is_set():
                pgsignals.subscribe(receive, "items").cancel()
                with pgsignals.stream("items") as events:
                    events.get(0)

        threads = [threading.Thread(target=busy) for _ in range(4)]
        for thread in threads:
            thread.start()

        def work():
            pgsignals.subscribe(receive, "items").cancel()
            pgsignals.start(dsn, ["items"])
            pgsignals.stop()

        try:
            for _ in range(10):
                child_ends(work)
        finally:
            done.set()
        pgsignals.stop()
        """,
    )


def test_multiprocessing(dsn: str) -> None:
    """A pool of forked workers neither hangs nor disturbs the listener."""
    run(
        dsn,
        """
        import multiprocessing
        pgsignals.start(dsn, ["items"])
        pgsignals.on("items")(receive)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
        insert()
        wait()
        """,
    )


def test_descriptors_of_the_parent_are_not_kept(dsn: str) -> None:
    """The child gives up its copies of the parent's sockets."""
    out = run(
        dsn,
        """
        def count():
            return len(os.listdir("/proc/self/fd"))

        before = count()
        pgsignals.start(dsn, ["items"])
        child_ends(lambda: print(count() - before))
        pgsignals.stop()
        """,
    )
    assert int(out) == 0


def test_exit_code_and_output_are_clean(dsn: str) -> None:
    """SIGTERM's default ends the process at once, also while events arrive."""
    script = """
pgsignals.start(dsn, ["items"])
print("up", flush=True)
pgsignals.wait()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script, dsn],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == -15
    assert errors == ""


# A fork in C, as uWSGI makes it, calls none of the hooks of Python. PyDLL keeps the global lock,
# which the child could not take from a thread that is not there; an alarm ends a child that hangs.
# The interpreter itself may hang it, in its global lock where a thread waited for that, say, which
# its hooks would have made anew: such a child is made again, where a lock of ours would hang each
# of them. At the fork a thread that is not in the child holds the ``locks``.
IN_C = """
import contextlib, ctypes, signal

@contextlib.contextmanager
def held(locks):
    ready, over = threading.Event(), threading.Event()

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            ready.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    yield
    over.set()
    thread.join()

def fork_in_c(work, end=os._exit, locks=None):
    sys.stdout.flush()
    for _ in range(8):
        with contextlib.nullcontext() if locks is None else held(locks):
            pid = ctypes.PyDLL(None).fork()
            if pid == 0:
                signal.alarm(15)
                try:
                    work()
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
                end(0)
        _, status = os.waitpid(pid, 0)
        if status != signal.SIGALRM:
            break
    assert status == 0, status
"""


def test_a_fork_without_hooks_is_noticed(dsn: str, delivery: Delivery) -> None:
    """Whatever the child asks first, it is told of itself, and the parent loses nothing by it."""
    out = run(
        dsn,
        IN_C
        + f"delivery = {delivery!r}\n"
        + """
import asyncio, types
from pgsignals.contrib.feeds import Feeds
from pgsignals.testing import EventLog
from tests import hub_parts
gauges = []
metrics = types.SimpleNamespace(
    count=lambda *_, **__: None, gauge=lambda name, read, **_: gauges.append(read)
)
hub = pgsignals.default_hub
items = pgsignals.watch("items", extra=["id"])
subscription = pgsignals.subscribe(receive, "items", id=-1)
options = {"delivery": delivery}
pgsignals.start(dsn, [items], metrics=metrics, **options)
pgsignals.on("items")(receive)
gaps, lost = [], []
pgsignals.on_gap(gaps.append)
pgsignals.disconnected.connect(lambda hub, error: lost.append(error), weak=False)
stream = pgsignals.stream("items")

def refused(call, *arguments):
    try:
        call(*arguments)
    except pgsignals.StateError:
        return True

async def next_of(stream):
    return [event async for event in stream]

QUESTIONS = {
    "running": lambda: not hub.running,
    "repr": lambda: repr(hub) == "<Hub stopped>",
    "health": lambda: not hub.health().alive and not hub.health().connected,
    "status": lambda: refused(hub.status),
    "backfill": lambda: refused(hub.backfill, "items"),
    "settle": lambda: refused(EventLog(hub).settle, 1),
    "wait": lambda: hub.wait(),
    "run": lambda: hub.run(),
    "stop": lambda: hub.stop(),
    "astop": lambda: asyncio.run(hub.astop()),
    "stream": lambda: stream.get() is None,
    "iteration": lambda: list(stream) == [],
    "async iteration": lambda: asyncio.run(next_of(stream)) == [],
    "closing": lambda: stream.close() is None,
    "wait_for": lambda: refused(hub.wait_for, "items"),
    "cancel": lambda: subscription.cancel() is None,
    "subscribe": lambda: hub.subscribe(receive, "items").cancel() is None,
    "on_gap": lambda: hub.on_gap(print) is print,
    "signal": lambda: hub.signal("items", "inserted") is not None,
    "feed": lambda: refused(feeds.open, ["items"], 10, True),
    "client": lambda: client.read() == b"" and client.ended,
    "gauge": lambda: all(read() == 0.0 for read in gauges),
    "start": lambda: hub.start(dsn, [items], **options) is hub,
}
feeds = Feeds(hub)
feed = feeds.open(["items"], 10, True).wait(60)
client = feed.connect(None, lambda: None)

def ask(name, answer):
    if not answer():
        print(name, "was wrong")
    if name == "start":
        insert()
        wait()
        hub.stop()

for name, answer in QUESTIONS.items():
    locks = *hub_parts.locks(hub), stream._condition, feed._lock, feeds._lock
    fork_in_c(lambda: ask(name, answer), locks=locks)
wait()      # the row of the child that has started
insert()
wait()
assert not gaps and not lost, (gaps, lost)
hub.stop()
""",
    )
    assert out == ""


def test_a_child_without_hooks_may_start_by_itself(dsn: str) -> None:
    """With restart_after_fork it listens once it is asked anything."""
    run(
        dsn,
        IN_C
        + """
pgsignals.start(dsn, ["items"], restart_after_fork=True)
pgsignals.on("items")(receive)
ready = threading.Event()
pgsignals.connected.connect(lambda hub: os.getpid() != parent and ready.set(), weak=False)
parent = os.getpid()

def work():
    assert not pgsignals.health().ready
    assert ready.wait(60)
    insert()
    wait()
    assert pgsignals.health().ready

fork_in_c(work, end=sys.exit)
wait()
""",
    )


def test_a_child_without_hooks_ends(dsn: str) -> None:
    """Its end neither waits for the parent's threads, nor starts anything, nor ends a session."""
    run(
        dsn,
        IN_C
        + """
pgsignals.start(dsn, ["items"], restart_after_fork=True)
pgsignals.on("items")(receive)
lost = []
pgsignals.disconnected.connect(lambda hub, error: lost.append(error), weak=False)
fork_in_c(lambda: None, end=sys.exit)
insert()
wait()
assert not lost, lost
""",
    )
