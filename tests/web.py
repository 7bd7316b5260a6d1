"""An application as gunicorn serves it: requests write, and every process hears of the rows.

Each process prints what it hears, with its id, in one write, so that lines do not mix.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import psycopg2
from flask import Flask

import pgsignals

DSN = os.environ["PGSIGNALS_DSN"]

app = Flask(__name__)


@app.post("/")
def insert() -> str:
    """Add a row, and answer with its id."""
    connection = psycopg2.connect(DSN)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("INSERT INTO items DEFAULT VALUES RETURNING id")
            [(number,)] = cursor.fetchall()
    finally:
        connection.close()
    return str(number)


@app.get("/")
def process() -> str:
    """The id of the process that answers."""
    return str(os.getpid())


def _print(*words: object) -> None:
    os.write(1, " ".join(map(str, (os.getpid(), *words, "\n"))).encode())


@pgsignals.on("items")
def _received(event: pgsignals.Event) -> None:
    _print("item", event.id)


@pgsignals.on_gap
def _missed(gap: pgsignals.Gap) -> None:
    _print("gap", gap.reason)


@pgsignals.connected.connect
def _connected(hub: pgsignals.Hub) -> None:
    _print("connected")


@pgsignals.disconnected.connect
def _disconnected(hub: pgsignals.Hub, error: BaseException) -> None:
    _print("disconnected", error)


@app.get("/health")
def health() -> str:
    """Why this process is not ready."""
    return pgsignals.health().reason


def _rest() -> None:
    """In uWSGI's master, wait until no other thread runs: beside one, it forks workers that hang.

    So docs/operations.md says of py-call-uwsgi-fork-hooks.
    """
    uwsgi = sys.modules.get("uwsgi")
    if uwsgi is None or uwsgi.worker_id():
        return
    tasks, pause = Path("/proc/self/task"), threading.Event()

    def turns() -> list[str]:
        others = [each for each in tasks.iterdir() if each.name != str(os.getpid())]
        lines = [line for each in others for line in (each / "status").read_text().splitlines()]
        return [line for line in lines if "ctxt_switches" in line]

    before: list[str] = []
    while (now := turns()) != before:
        before = now
        pause.wait(0.05)


def listening() -> Flask:
    """The application, which listens already: in the master of a server that forks afterwards."""
    pgsignals.start(DSN, ["items"], restart_after_fork=True)
    _rest()
    return app


def listening_once() -> Flask:
    """The same, without listening in the children of the master."""
    pgsignals.start(DSN, ["items"])
    _rest()
    return app


def hooked() -> Flask:
    """The same, with a hook of its own in uWSGI."""
    if os.environ["HOOK"] == "decorated":
        from uwsgidecorators import postfork

        postfork(lambda: _print("hook"))
        return listening()
    import uwsgi

    if os.environ["HOOK"] == "late":
        pgsignals.start(DSN, ["items"], restart_after_fork=True)
        _rest()
    uwsgi.post_fork_hook = lambda: _print("hook")
    return app if pgsignals.default_hub.running else listening()
