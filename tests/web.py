"""An application as gunicorn serves it: requests write, and every process hears of the rows.

Each process prints what it hears, with its id, in one write, so that lines do not mix.
"""

from __future__ import annotations

import os

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


def listening() -> Flask:
    """The application, which listens already: in the master of a server that forks afterwards."""
    pgsignals.start(DSN, ["items"], restart_after_fork=True)
    return app


def listening_once() -> Flask:
    """The same, without listening in the children of the master."""
    pgsignals.start(DSN, ["items"])
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
    uwsgi.post_fork_hook = lambda: _print("hook")
    return app if pgsignals.default_hub.running else listening()
