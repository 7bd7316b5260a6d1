"""Flask's reloader: of its two processes one listens, and so does the one that replaces it."""

from __future__ import annotations

import http.client
import re
from pathlib import Path

import pytest

from tests.commands import Program
from tests.conftest import DEADLINE, Database
from tests.waiting import eventually

APP = """
import os

import psycopg2
from flask import Flask
from werkzeug.serving import is_running_from_reloader

import pgsignals

DSN = os.environ["PGSIGNALS_DSN"]


def say(*words):
    os.write(1, " ".join(map(str, (os.getpid(), *words, "\\n"))).encode())


@pgsignals.on("items")
def received(event):
    say("item", event.id)


@pgsignals.connected.connect
def connected(hub):
    say("connected")


def start():
    if not pgsignals.default_hub.running:
        pgsignals.start(DSN, ["items"])


def create_app():
    say("factory")
    app = Flask(__name__)
    HERE

    @app.post("/")
    def insert():
        connection = psycopg2.connect(DSN)
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute("INSERT INTO items DEFAULT VALUES RETURNING id")
                [(number,)] = cursor.fetchall()
        finally:
            connection.close()
        return str(number)

    return app
"""


class FlaskRun:
    """A running ``flask run --debug``, and what its processes have printed."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.program = Program(
            *("-m", "flask", "--app", "shop", "run", "--debug", "--port", "0"),
            dsn=dsn,
            cwd=folder,
        )
        while not (found := re.search(r"Running on http://127\.0\.0\.1:(\d+)", self.program.err())):
            pass
        self._port = int(found[1])

    def until(self, what: str) -> tuple[int, list[str]]:
        """The process that prints this next, and what was printed up to there."""
        lines = []
        while True:
            process, line = self.program.out().rstrip().split(" ", 1)
            lines.append(line)
            if line == what:
                return int(process), lines

    def post(self) -> str:
        """Have the application insert a row; its id."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE)
        try:
            connection.request("POST", "/")
            answer = connection.getresponse()
            body = answer.read().decode()
        finally:
            connection.close()
        assert answer.status == 200, body
        return body


def gone(process: int) -> bool:
    """Whether the process has ended, and its parent knows."""
    return not Path(f"/proc/{process}").exists()


@pytest.mark.parametrize(
    "here",
    [
        "if not app.debug or is_running_from_reloader(): start()",
        "app.before_request(start)",
    ],
    ids=["factory", "first request"],
)
def test_one_set_of_events_before_and_after_a_reload(
    here: str, dsn: str, db: Database, tmp_path: Path
) -> None:
    """Touching a file replaces the process that listens; no process and no session is left."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    module = tmp_path / "shop.py"
    module.write_text(APP.replace("HERE", here))
    running = FlaskRun(tmp_path, dsn)
    parent = running.program.process.pid
    try:
        everything: list[str] = []
        listened = []
        for reload in (False, True):
            if reload:
                module.touch()
                # Until the new one has made its application, the old one may answer.
                process, lines = running.until("factory")
                everything += lines
                assert process not in (parent, *listened)
            written = [running.post() for _ in range(3)]
            process, lines = running.until(f"item {written[-1]}")
            everything += lines
            listened.append(process)
            assert [line for line in lines if line.startswith("item")] == [
                f"item {number}" for number in written
            ]
        assert listened[0] != listened[1]
        assert parent not in listened
        assert gone(listened[0])
    finally:
        running.program.process.terminate()
        end = running.program.end()
    # What came late would show here: a second listener, or an event that came twice.
    everything += [line.split(" ", 1)[1].rstrip() for line in end.out]
    assert everything.count("connected") == 2
    assert sorted(line for line in everything if line.startswith("item")) == [
        f"item {number}" for number in range(1, 7)
    ]
    assert all(gone(process) for process in (parent, *listened))
    assert not any("Traceback" in line for line in end.err), end.err
    sessions = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name = 'pgsignals' AND datname = current_database()"
    )
    eventually(lambda: db(sessions), lambda rows: rows == [(0,)])
