"""The ends and the beginnings of processes: signals, interpreter exit, multiprocessing."""

from __future__ import annotations

import signal
import textwrap
import threading
import time
from pathlib import Path

import pytest

import pgsignals
from pgsignals import Hub
from tests.commands import Program
from tests.conftest import DEADLINE, Database

QUEUED = 20

PRELUDE = r"""
import os, signal, sys, threading, time
import psycopg2, pgsignals

dsn = os.environ["PGSIGNALS_DSN"]
hub = pgsignals.default_hub

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())

@pgsignals.on("items")
def receive(event):
    say(event.id)
    work()

def insert(count):
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    connection.cursor().execute("INSERT INTO items (n) SELECT generate_series(1, %s)", [count])
    connection.close()

def insert_during_run(count):
    before = signal.getsignal(signal.SIGTERM)

    def wait_and_insert():
        # Nothing but the handler tells that run() has begun.
        while signal.getsignal(signal.SIGTERM) is before:
            time.sleep(0.01)
        insert(count)

    threading.Thread(target=wait_and_insert).start()

def slow():
    # Until stop() has begun, which nothing else tells: all the rest is queued by then.
    while hub.running:
        time.sleep(0.01)

def stuck():
    slow()
    say("draining")
    hang()

def hang():
    threading.Event().wait()  # For ever, which is what is tested.

work = slow

def start():
    pgsignals.start(dsn, ["items"])
"""


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """A table."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, n int)")


def program(dsn: str, script: str) -> Program:
    """The script, running after the prelude."""
    # Python warns of forks beside threads from 3.12 on; here they are what is tested.
    forking = ("-W", "ignore::DeprecationWarning:__main__")
    return Program(*forking, "-c", PRELUDE + textwrap.dedent(script), dsn=dsn)


def queued(first: int = 1) -> list[str]:
    """What a program prints that handles all rows from ``first`` on."""
    return [str(number) for number in range(first, QUEUED + 1)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_drains_at_a_signal(dsn: str, number: signal.Signals) -> None:
    """Slow receivers handle all that is queued before the program goes on, and ends well."""
    running = program(
        dsn,
        f"""
        start()
        insert_during_run({QUEUED})
        say("all handled:", pgsignals.run())
        """,
    )
    assert running.out() == "1"
    running.process.send_signal(number)
    end = running.end()
    assert (end.code, end.out, end.err) == (0, [*queued(2), "all handled: True"], [])


def test_run_ends_by_a_signal_that_another_thread_takes(dsn: str) -> None:
    """It does not wake the main thread, as one that comes while the process is stopped may not."""
    running = program(
        dsn,
        """
        def work():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        start()
        insert_during_run(1)
        say("all handled:", pgsignals.run())
        """,
    )
    end = running.end()
    assert (end.code, end.out, end.err) == (0, ["1", "all handled: True"], [])


def test_run_waits_no_longer_than_its_timeout(dsn: str) -> None:
    """A receiver that is stuck does not keep the program from ending, and is logged."""
    running = program(
        dsn,
        """
        work = stuck
        start()
        insert_during_run(2)
        say("all handled:", pgsignals.run(timeout=0.5))
        """,
    )
    assert running.out() == "1"
    before = time.monotonic()
    running.process.terminate()
    end = running.end()
    assert 0.5 <= time.monotonic() - before < DEADLINE
    assert (end.code, end.out) == (0, ["draining", "all handled: False"])
    assert end.err == ["stopped after 0.5 s with receivers still at work"]


def test_a_second_signal_ends_run_at_once(dsn: str) -> None:
    """However long the receivers were given."""
    running = program(
        dsn,
        """
        work = stuck
        start()
        insert_during_run(1)
        say("all handled:", pgsignals.run(timeout=3600))
        """,
    )
    assert running.out() == "1"
    running.process.terminate()
    assert running.out() == "draining"
    running.process.terminate()
    end = running.end()
    assert (end.code, end.out, end.err) == (0, ["all handled: False"], [])


def test_run_ends_with_the_hub(dsn: str) -> None:
    """``stop`` elsewhere ends it, with what that returned; then the handlers are as before."""
    running = program(
        dsn,
        """
        def mine(number, frame): ...

        signal.signal(signal.SIGTERM, mine)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            pgsignals.run()
        except pgsignals.StateError as error:
            say("not started:", error)

        def work():
            assert signal.getsignal(signal.SIGTERM) is not mine
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            threading.Thread(target=hub.stop).start()

        start()
        insert_during_run(1)
        say("all handled:", pgsignals.run())
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        """,
    )
    end = running.end()
    assert (end.code, end.err) == (0, [])
    assert end.out[0].endswith("call start() before it.")
    assert end.out[1:] == ["1", "all handled: True"]


def test_a_child_of_a_receiver_ends_at_sigterm(dsn: str) -> None:
    """What a receiver forks while the program is in ``run`` has the former handlers."""
    running = program(
        dsn,
        """
        def work():
            pid = os.fork()
            if pid == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            say("ended by", os.WTERMSIG(status))

        start()
        insert_during_run(1)
        pgsignals.run()
        """,
    )
    assert running.out() == "1"
    assert running.out() == f"ended by {signal.SIGTERM.value}"
    running.process.terminate()
    end = running.end()
    assert (end.code, end.out, end.err) == (0, [], [])


def test_run_elsewhere_than_in_the_main_thread(hub: Hub) -> None:
    """Signals are for the main thread; the error says what to call instead."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            hub.run()
        except pgsignals.StateError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(DEADLINE)
    [error] = errors
    assert "main thread" in str(error)
    assert "wait()" in str(error)


@pytest.mark.parametrize(
    ("ending", "code", "last_error"),
    [
        ("", 0, None),
        ("sys.exit(3)", 3, None),
        ("raise LookupError('mine')", 1, "LookupError: mine"),
        ("os.kill(os.getpid(), signal.SIGINT); hub.wait()", -signal.SIGINT, "KeyboardInterrupt"),
    ],
    ids=["end of the script", "sys.exit", "unhandled", "KeyboardInterrupt"],
)
def test_exit_drains(dsn: str, ending: str, code: int, last_error: str | None) -> None:
    """Without ``stop``, what is queued is handled at exit; no traceback but the program's own."""
    running = program(
        dsn,
        f"""
        first = threading.Event()
        def work():
            first.set()
            slow()

        start()
        insert({QUEUED})
        assert first.wait({DEADLINE})
        {ending}
        """,
    )
    end = running.end()
    assert (end.code, end.out) == (code, queued())
    assert end.err[-1:] == ([] if last_error is None else [last_error])
    assert sum("Traceback" in line for line in end.err) == len(end.err[-1:])


def test_exit_waits_five_seconds_for_all_hubs_together(dsn: str) -> None:
    """Receivers that are stuck, of however many Hubs, hold up the exit no longer."""
    running = program(
        dsn,
        """
        entered = threading.Semaphore(0)
        def work(event):
            entered.release()
            hang()

        hubs = [pgsignals.Hub() for _ in range(4)]
        for each in hubs:
            each.on("items")(work)
            each.start(dsn, ["items"])
        insert(1)
        for each in hubs:
            entered.acquire()
        say("exit")
        """,
    )
    assert running.out() == "exit"
    before = time.monotonic()
    end = running.end()
    # One after the other they would take 20.
    assert 4.5 < time.monotonic() - before < 15
    assert end.code == 0
    assert len(end.err) == 4
    assert all("receivers still at work" in line for line in end.err)


def test_os_exit(dsn: str) -> None:
    """It ends at once, as it always does, and quietly."""
    running = program(
        dsn,
        """
        work = stuck
        start()
        insert(2)
        threading.Thread(target=lambda: os._exit(7)).start()
        hub.wait()
        """,
    )
    end = running.end()
    assert (end.code, end.err) == (7, [])


STARTING = """
import socket

silent = socket.create_server(("127.0.0.1", 0))
address = f"postgresql://127.0.0.1:{silent.getsockname()[1]}/"
starting = lambda: hub.start(address, ["items"], heartbeat_timeout=60)
threading.Thread(target=starting, daemon=True).start()
accepted = silent.accept()
"""


def test_stop_while_another_thread_starts(dsn: str) -> None:
    """It waits no longer than its timeout: a program may end while a server does not answer."""
    running = program(
        dsn,
        STARTING
        + """
say("stopped:", hub.stop(0.1))
os._exit(0)
""",
    )
    end = running.end()
    assert (end.code, end.out) == (0, ["stopped: False"])
    assert end.err == ["not stopped within 0.1 s: it is being started"]


def test_a_fork_while_another_thread_starts(dsn: str) -> None:
    """The child may start: it does not inherit a start that will never end."""
    running = program(
        dsn,
        STARTING
        + """
pid = os.fork()
if pid == 0:
    start()
    say("stopped:", hub.stop())
    os._exit(0)
os.waitpid(pid, 0)
os._exit(0)
""",
    )
    end = running.end()
    assert (end.code, end.out, end.err) == (0, ["stopped: True"], [])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_of_multiprocessing_listens(dsn: str, tmp_path: Path, method: str) -> None:
    """It starts a Hub of its own, also while its parent listens, and ends without ``stop``."""
    script = tmp_path / "main.py"
    script.write_text(
        PRELUDE
        + textwrap.dedent(
            f"""
            import multiprocessing

            arrived = threading.Semaphore(0)
            work = arrived.release

            def child():
                assert not hub.running
                start()
                insert(1)
                assert arrived.acquire(timeout={DEADLINE})

            if __name__ == "__main__":
                start()
                process = multiprocessing.get_context("{method}").Process(target=child)
                process.start()
                assert arrived.acquire(timeout={DEADLINE})
                process.join({DEADLINE})
                say("child:", process.exitcode)
                insert(1)
                assert arrived.acquire(timeout={DEADLINE})
                say("all handled:", pgsignals.stop())
            """
        )
    )
    running = Program("-W", "ignore::DeprecationWarning", str(script), dsn=dsn)
    end = running.end()
    assert (end.code, end.err) == (0, [])
    # The child's row reaches both, in whichever order.
    assert end.out == ["1", "1", "child: 0", "2", "all handled: True"]


def test_stop_before_the_restart_after_a_fork(dsn: str) -> None:
    """A child that stops its Hub while it cannot start again is left alone."""
    running = program(
        dsn,
        """
        import logging
        pgsignals.start(dsn, ["items"], restart_after_fork=True)
        tried = threading.Event()

        class Handler(logging.Handler):
            def emit(self, record):
                tried.set()

        logging.getLogger("pgsignals").addHandler(Handler(logging.ERROR))
        admin = psycopg2.connect(dsn, dbname="postgres")
        admin.autocommit = True
        name = psycopg2.extensions.parse_dsn(dsn)["dbname"]
        admin.cursor().execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
        admin.cursor().execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        pid = os.fork()
        if pid == 0:
            assert tried.wait(60)
            [restart] = [t for t in threading.enumerate() if t.name == "pgsignals-restart"]
            assert pgsignals.stop()
            restart.join(60)
            os._exit(int(restart.is_alive() or hub.running))
        _, status = os.waitpid(pid, 0)
        admin.cursor().execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        say("child:", status)
        """,
    )
    end = running.end()
    assert (end.code, end.out) == (0, ["child: 0"])
