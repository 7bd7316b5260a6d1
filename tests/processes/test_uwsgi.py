"""uWSGI's workers, which it forks without calling Python's hooks."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import Program, Result
from tests.conftest import Database
from tests.paths import ROOT
from tests.served import Served
from tests.waiting import eventually

RUN = "import sys, pyuwsgi; pyuwsgi.run(sys.argv[1:])"

Start = Callable[..., Served]


@pytest.fixture
def start(dsn: str, db: Database) -> Iterator[Start]:
    """Starts a uWSGI with a master and two workers, which are killed at the end."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, tenant integer NOT NULL DEFAULT 1)")
    programs: list[Program] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(*arguments: str, **variables: str) -> Served:
            program = Program(
                *("-c", RUN, "--master", "--die-on-term", "--processes=2", "--need-app"),
                *("--socket-protocol=http", f"--socket=fd://{listener.fileno()}", *arguments),
                dsn=dsn,
                cwd=ROOT,
                descriptors=[listener.fileno()],
                **variables,
            )
            programs.append(program)
            return Served(program, listener.getsockname()[1])

        yield serve
        for program in programs:
            program.process.kill()
            program.process.wait()


def end(served: Served) -> Result:
    """End it at SIGTERM; no process waits for what is not there."""
    # uWSGI's master ignores SIGTERM until it has forked all workers, and a worker loses what the
    # master has sent it before it serves: the master would wait for it for a minute.
    eventually(lambda: catches(served.program.process.pid, signal.SIGTERM), bool)
    serving: set[str] = set()
    while len(serving) < 2:
        serving.add(served.request())
    served.program.process.send_signal(signal.SIGTERM)
    found = served.program.end()
    assert not [line for line in found.err if "Traceback" in line or "still at work" in line]
    return found


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    [mask] = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.M)
    return bool(int(mask, 16) >> (number - 1) & 1)


def workers(served: Served, count: int) -> set[int]:
    """The workers, once they have begun to listen."""
    master = served.program.process.pid
    served.read_until(lambda: len(set(served.heard) - {master}) >= count)
    return set(served.heard) - {master}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="plain"),
        pytest.param(["--py-call-uwsgi-fork-hooks"], id="hooks"),
        pytest.param(["--lazy-apps"], id="lazy-apps"),
    ],
)
def test_workers_of_a_master_that_listens(start: Start, arguments: list[str]) -> None:
    """Each listens, before anybody asks, and hears everything; so does one in another's place."""
    served = start("--enable-threads", "--module=tests.web:listening()", *arguments)
    first = workers(served, 2)
    for each in served.heard:
        served.read_until(lambda each=each: served.heard[each] == ["connected"])  # type: ignore[misc]
    line = f"item {served.request('POST')}"
    served.read_until(lambda: all(line in heard for heard in served.heard.values()))
    os.kill(min(first), signal.SIGKILL)
    [replacing] = workers(served, 3) - first
    line = f"item {served.request('POST')}"
    served.read_until(lambda: line in served.heard[replacing])
    assert served.heard[replacing] == ["connected", line]
    assert end(served).code == 0


def test_a_hub_that_does_not_restart(start: Start) -> None:
    """A worker says that it does not listen; the master goes on."""
    served = start("--enable-threads", "--module=tests.web:listening_once()")
    assert served.request(path="/health") == "it is not running"
    served.read_until(lambda: "connected" in served.heard[served.program.process.pid])
    line = f"item {served.request('POST')}"
    served.read_until(lambda: line in served.heard[served.program.process.pid])
    assert len(served.heard) == 1
    end(served)


def test_the_flask_extension(start: Start) -> None:
    """Each worker listens from its first request on, and the master does not."""
    served = start("--enable-threads", "--module=tests.flask_shop:create_app()")
    processes: set[int] = set()
    while len(processes) < 2:
        processes.add(int(served.request()))
    line = f"shop item {served.request('POST')} 1"
    served.read_until(lambda: all(line in served.heard[each] for each in processes))
    assert dict(served.heard) == {each: ["connected", line] for each in processes}
    end(served)


@pytest.mark.parametrize("hook", ["plain", "decorated", "late"])
def test_hooks_of_the_application(start: Start, hook: str) -> None:
    """What the application has uWSGI call after a fork is called as before.

    Where that takes the place of ours, since it came late, a worker listens once it is asked.
    """
    served = start("--enable-threads", "--module=tests.web:hooked()", HOOK=hook)
    if hook == "late":
        for each in workers(served, 2):
            assert served.heard[each] == ["hook"]
        served.request(path="/health")
        served.read_until(lambda: ["hook", "connected"] in served.heard.values())
        end(served)
        return
    for each in workers(served, 2):
        served.read_until(
            lambda each=each: sorted(served.heard[each]) == ["connected", "hook"]  # type: ignore[misc]
        )
    end(served)


def test_without_threads(dsn: str, db: Database) -> None:
    """Where uWSGI runs no threads, starting says that nothing will arrive."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    done = Program("-c", WITHOUT_THREADS, dsn=dsn).end()
    assert done.code == 0
    assert [line for line in done.err if "set enable-threads or threads" in line]


# That of pyuwsgi always runs them.
WITHOUT_THREADS = """
import os, sys, types
sys.modules["uwsgi"] = types.SimpleNamespace(has_threads=0, masterpid=lambda: 0)
import pgsignals
pgsignals.start(os.environ["PGSIGNALS_DSN"], ["items"])
"""
