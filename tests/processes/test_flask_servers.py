"""The Flask extension under the servers that people use, each in processes of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Program
from tests.conftest import DEADLINE, Database
from tests.paths import ROOT
from tests.served import Served
from tests.waiting import eventually


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """The table of the application."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, tenant integer NOT NULL DEFAULT 1)")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket on loopback for gunicorn to serve."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def listeners(db: Database) -> int:
    """How many sessions listen."""
    [(count,)] = db(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgsignals%'"
        " AND datname = current_database()"
    )
    return int(count)


def triggers(db: Database) -> int:
    """How many triggers of ours there are."""
    [(count,)] = db("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'pgsignals%'")
    return int(count)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="plain"),
        pytest.param(["--worker-class=gthread", "--threads=4"], id="gthread"),
        pytest.param(["--preload"], id="preload"),
        pytest.param(["--preload", "--worker-class=gthread", "--threads=4"], id="preload-gthread"),
    ],
)
def test_gunicorn(dsn: str, db: Database, listener: socket.socket, arguments: list[str]) -> None:
    """Each worker hears everything from its first request on, and the master nothing."""
    served = Served(
        Program(
            *("-m", "gunicorn", "--workers=2", "--no-control-socket"),
            *(f"--bind=fd://{listener.fileno()}", *arguments, "tests.flask_shop:create_app()"),
            dsn=dsn,
            cwd=ROOT,
            descriptors=[listener.fileno()],
        ),
        listener.getsockname()[1],
    )
    try:
        workers: set[int] = set()
        while len(workers) < 2:
            workers.add(int(served.request()))
        item = served.request("POST")
        line = f"shop item {item} 1"
        served.read_until(lambda: all(line in served.heard[each] for each in workers))
        assert dict(served.heard) == {each: ["connected", line] for each in workers}
        assert eventually(lambda: listeners(db), lambda count: count == 2) == 2
    finally:
        served.end()


def test_gunicorn_started_before_requests(dsn: str, db: Database, listener: socket.socket) -> None:
    """With start() in post_worker_init, workers listen before anybody asks them anything."""
    served = Served(
        Program(
            *("-m", "gunicorn", "--workers=2", "--no-control-socket", "--preload"),
            *("--config=python:tests.flask_gunicorn", f"--bind=fd://{listener.fileno()}"),
            "tests.flask_shop:create_app()",
            dsn=dsn,
            cwd=ROOT,
            descriptors=[listener.fileno()],
        ),
        listener.getsockname()[1],
    )
    try:
        served.read_until(lambda: len(served.heard) == 2)
        assert served.program.process.pid not in served.heard
        workers = set(served.heard)
        db("INSERT INTO items DEFAULT VALUES")
        line = "shop item 1 1"
        served.read_until(lambda: all(line in served.heard[each] for each in workers))

        # One that dies is replaced by one that listens as well.
        os.kill(min(workers), signal.SIGKILL)
        served.read_until(lambda: len(served.heard) == 3)
    finally:
        served.end()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the application that a test may edit."""
    shutil.copy(ROOT / "tests/flask_shop.py", tmp_path / "shop.py")
    return tmp_path


def test_flask_run_with_the_reloader(dsn: str, db: Database, project: Path) -> None:
    """One process listens, the one that serves; a reload replaces it by one with the new code."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = Program(
        *("-m", "flask", "--app", "shop", "run", "--debug", "--port", str(port)),
        dsn=dsn,
        cwd=project,
    )
    served = Served(program, port)
    try:
        while "Debugger PIN" not in program.err():
            pass
        process = int(served.request())
        served.read_until(lambda: served.heard[process] == ["connected"])
        assert process != program.process.pid
        assert eventually(lambda: listeners(db), lambda count: count == 1) == 1

        code = (project / "shop.py").read_text()
        (project / "shop.py").write_text(code.replace('"item"', '"changed item"'))
        while "Debugger PIN" not in program.err():
            pass
        reloaded = int(served.request())
        served.read_until(lambda: served.heard[reloaded] == ["connected"])
        served.request("POST")
        served.read_until(lambda: len(served.heard[reloaded]) == 2)
        assert served.heard == {
            process: ["connected"],
            reloaded: ["connected", "shop changed item 1 1"],
        }
        assert eventually(lambda: listeners(db), lambda count: count == 1) == 1
    finally:
        # The reloader's parent does not tell its child of a signal; Ctrl-C in a terminal does.
        for each in [*served.heard, program.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGINT)
        program.end()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["routes"], "health/live"),
        (["shell"], ""),
        (["pgsignals", "--help"], "status"),
    ],
)
def test_commands_start_nothing(dsn: str, db: Database, arguments: list[str], words: str) -> None:
    """Neither ``flask routes`` nor ``flask shell`` connects to the database."""
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "tests.flask_shop", *arguments],
        input="import threading; print('threads', threading.active_count())",
        env={**os.environ, "PGSIGNALS_DSN": dsn},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE,
        check=True,
    )
    assert words in done.stdout
    assert "connected" not in done.stdout
    if arguments == ["shell"]:
        assert "threads 1" in done.stdout
    assert triggers(db) == 0


PREFORK = """
import io, os, sys
from wsgiref.util import setup_testing_defaults
from tests.flask_shop import create_app

application = create_app()     # As uWSGI without lazy-apps: loaded once, in the master.
for _ in range(2):
    if os.fork() == 0:
        environ = {}
        setup_testing_defaults(environ)
        def request():
            return b"".join(application(environ, lambda status, headers: None)).decode()
        assert request() == str(os.getpid())
        sys.stdin.read()
        os._exit(0)
for _ in range(2):
    os.wait()
"""


# A master that has served, or whose hook has started the Hub, before it forks.
STARTED = PREFORK.replace(
    "for _ in range(2):\n    if",
    """
signals = application.extensions["pgsignals"]
with application.test_request_context("/events"):
    from tests.flask_shop import ITEMS, sse
    signals.start(application)
    stream = sse(ITEMS)
    assert b"id: " in next(iter(stream.response))
for _ in range(2):
    if""",
    1,
).replace(
    "        sys.stdin.read()",
    """
        from tests.flask_shop import sse
        with application.test_request_context("/events"):
            assert b"id: " in next(iter(sse(ITEMS).response))
        sys.stdin.read()""",
)


@pytest.mark.parametrize("delivery", ["notify", "outbox"])
def test_a_server_whose_master_listens(dsn: str, db: Database, delivery: str) -> None:
    """Workers that are forked from a master with a Hub and streams have their own, as it has."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", STARTED],
        stdin=read,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PGSIGNALS_DSN": dsn, "SHOP_DELIVERY": delivery},
        cwd=ROOT,
    )
    os.close(read)
    try:
        assert process.stdout is not None
        first = [process.stdout.readline().split() for _ in range(3)]
        assert [words for _, *words in first] == [["connected"]] * 3
        assert len({process for process, *_ in first}) == 3
        db("INSERT INTO items DEFAULT VALUES")
        heard = [process.stdout.readline() for _ in range(3)]
        assert all(re.fullmatch(r"\d+ shop item 1 1 \n", line) for line in heard)
        assert {line.split()[0] for line in heard} == {each for each, *_ in first}
        os.close(write)
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_server_that_forks_after_loading(dsn: str, db: Database) -> None:
    """Workers that are forked from a loaded application each listen, and the master does not."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PREFORK],
        stdin=read,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PGSIGNALS_DSN": dsn},
        cwd=ROOT,
    )
    os.close(read)
    try:
        assert process.stdout is not None
        first = [process.stdout.readline().split() for _ in range(2)]
        assert [words for _, *words in first] == [["connected"]] * 2
        assert len({process for process, *_ in first} - {str(process.pid)}) == 2
        db("INSERT INTO items DEFAULT VALUES")
        heard = [process.stdout.readline() for _ in range(2)]
        assert all(re.fullmatch(r"\d+ shop item 1 1 \n", line) for line in heard)
        os.close(write)
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        process.communicate()
