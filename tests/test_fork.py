"""Forks, as gunicorn, multiprocessing and reloaders make them."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

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
