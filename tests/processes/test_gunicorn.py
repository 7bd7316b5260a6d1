"""gunicorn's workers: each hears of every row that a request to any of them writes."""

from __future__ import annotations

import http.client
import os
import signal
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.commands import Program
from tests.conftest import DEADLINE, Database
from tests.paths import ROOT

WORKERS = 4
IN_WORKERS = ("--config", "python:tests.web_gunicorn", "tests.web:app")


class Gunicorn:
    """A running gunicorn, and what its processes have printed."""

    def __init__(self, listener: socket.socket, dsn: str, *arguments: str) -> None:
        self._port: int = listener.getsockname()[1]
        self.program = Program(
            *("-m", "gunicorn", "--workers", str(WORKERS), "--no-control-socket"),
            *("--bind", f"fd://{listener.fileno()}", *arguments),
            dsn=dsn,
            cwd=ROOT,
            descriptors=[listener.fileno()],
        )
        self.heard: dict[int, list[str]] = defaultdict(list)

    @property
    def master(self) -> int:
        """The master's process id."""
        return self.program.process.pid

    def read_until(self, done: Callable[[], bool]) -> None:
        """Read what the processes print until ``done()``; each line with a deadline."""
        while not done():
            process, what = self.program.out().rstrip().split(" ", 1)
            self.heard[int(process)].append(what)

    def workers(self, count: int) -> list[int]:
        """The workers that have begun to listen, once they are ``count``, the oldest first."""

        def listening() -> list[int]:
            return [each for each in self.heard if each != self.master]

        self.read_until(lambda: len(listening()) >= count)
        return listening()

    def post(self) -> str:
        """Have a worker insert a row; its id."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE)
        try:
            connection.request("POST", "/")
            answer = connection.getresponse()
            body = answer.read().decode()
        finally:
            connection.close()
        assert answer.status == 200, body
        return body

    def post_many(self) -> list[str]:
        """Have workers insert rows at the same time, and then a last one; their ids."""
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda _: self.post(), range(12)))
        return [*made, self.post()]

    def expect(self, processes: list[int], ids: list[str]) -> None:
        """Each process hears of each id, once, and of nothing else."""
        last = f"item {ids[-1]}"
        self.read_until(lambda: all(last in self.heard[each] for each in processes))
        for each in processes:
            # Ids are taken in another order than transactions commit.
            assert sorted(self.heard[each]) == sorted(f"item {i}" for i in ids)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket on loopback for gunicorn to serve."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.mark.parametrize(
    ("arguments", "master_listens"),
    [
        pytest.param(IN_WORKERS, False, id="plain"),
        pytest.param(("--worker-class=gthread", "--threads=4", *IN_WORKERS), False, id="gthread"),
        pytest.param(("--preload", *IN_WORKERS), False, id="preload"),
        pytest.param(("--preload", "tests.web:listening()"), True, id="preload-started-in-master"),
    ],
)
def test_each_worker_hears_everything(
    dsn: str,
    db: Database,
    listener: socket.socket,
    arguments: tuple[str, ...],
    master_listens: bool,
) -> None:
    """Also the worker that replaces one killed, whose end is no interruption for the others."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    served = Gunicorn(listener, dsn, *arguments)
    try:
        workers = served.workers(WORKERS)
        master = [served.master] if master_listens else []
        served.read_until(lambda: all(served.heard[each] for each in master))
        assert set(served.heard) == {*master, *workers}
        for process in served.heard:
            assert served.heard[process] == ["connected"]
            served.heard[process] = []
        first = served.post_many()
        served.expect([*master, *workers], first)

        os.kill(workers[0], signal.SIGKILL)
        *_, replacement = served.workers(WORKERS + 1)
        assert served.heard[replacement] == ["connected"]
        served.heard[replacement] = []
        later = served.post_many()
        served.expect([replacement], later)
        served.expect([*master, *workers[1:]], [*first, *later])
    finally:
        served.program.process.terminate()
        end = served.program.end()
    assert end.code == 0
    assert end.out == []
    assert not any("Traceback" in line for line in end.err), end.err
