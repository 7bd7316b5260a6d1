"""Programs whose threads are greenlets: gevent and eventlet, which replace Python's own."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable

import pytest

from pgsignals.hub.hub import Delivery
from tests.commands import Program
from tests.conftest import DEADLINE, Database
from tests.paths import ROOT
from tests.served import Served, Tab
from tests.waiting import eventually

GEVENT = "from gevent import monkey; monkey.patch_all()"
PATCHED = {
    "gevent": f"{GEVENT}\nfrom psycogreen.gevent import patch_psycopg; patch_psycopg()",
    # psycopg2 included. It says that it is deprecated.
    "eventlet": "import warnings; warnings.simplefilter('ignore')\n"
    "import eventlet; eventlet.monkey_patch()",
}

# A greenlet answers whoever connects, which shows that nothing stops all of them.
PROGRAM = """
import os, socket, sys, threading
import pgsignals, pgsignals.outbox.housekeeping

pgsignals.outbox.housekeeping.EVERY_SECONDS = 0.2
listener = socket.create_server(("127.0.0.1", 0))

def answer():
    while True:
        connection, _ = listener.accept()
        connection.sendall(b"here")
        connection.close()

threading.Thread(target=answer, daemon=True).start()
arrived = threading.Event()

@pgsignals.on("items")
def receive(event):
    print("item", event.id, flush=True)
    if event.id == 2:
        arrived.set()

pgsignals.start(os.environ["PGSIGNALS_DSN"], ["items"], delivery=sys.argv[1])
print(listener.getsockname()[1], flush=True)
arrived.wait()
print("stopped", pgsignals.stop(), flush=True)
"""


@pytest.fixture(autouse=True)
def items(db: Database) -> None:
    """The table that is watched."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, tenant integer NOT NULL DEFAULT 1)")


def ask(port: str) -> bytes:
    """What a greenlet of the program says."""
    with socket.create_connection(("127.0.0.1", int(port)), timeout=DEADLINE) as connection:
        return connection.recv(4)


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_delivery(dsn: str, db: Database, library: str, delivery: Delivery) -> None:
    """Events arrive, other greenlets go on, and stop ends it all with nothing left over.

    The log cannot be read there, which the start says.
    """
    program = Program("-c", f"{PATCHED[library]}\n{PROGRAM}", delivery, dsn=dsn)
    try:
        if delivery == "wal":
            assert "has a wait callback" in program.end().err[-1]
            return
        port = program.out()
        for number in (1, 2):
            assert ask(port) == b"here"
            db("INSERT INTO items DEFAULT VALUES")
            assert program.out() == f"item {number}"
        end = program.end()
        assert (end.code, end.out, end.err) == (0, ["stopped True"], [])
    finally:
        program.process.kill()
        program.process.wait()


def waiting(db: Database, query: str) -> list[tuple[int]]:
    """The sessions that wait for a lock with such a statement."""
    return db(
        "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s",
        [f"%{query}%"],
    )


def test_psycopg2_that_does_not_yield(
    dsn: str, db: Database, connect: Callable[[str], Database]
) -> None:
    """It is named at the start; and yet a locked outbox stops nobody but its readers."""
    locker = connect(dsn)
    program = Program("-c", f"{GEVENT}\n{PROGRAM}", "outbox", dsn=dsn)
    try:
        port = program.out()
        assert "call patch_psycopg() of psycogreen" in program.err()
        db("INSERT INTO items DEFAULT VALUES")
        assert program.out() == "item 1"
        locker("BEGIN; LOCK TABLE pgsignals.outbox_3 IN ACCESS EXCLUSIVE MODE")
        db("INSERT INTO items DEFAULT VALUES")
        for query in ("max(id)", "pgsignals_read"):
            eventually(functools.partial(waiting, db, query), bool)
            assert ask(port) == b"here"
        locker("COMMIT")
        assert program.out() == "item 2"
        end = program.end()
        assert (end.code, end.out) == (0, ["stopped True"])
    finally:
        program.process.kill()
        program.process.wait()


def test_gunicorn(dsn: str, db: Database) -> None:
    """A gevent worker hears of everything, and serves more streams than it has threads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        program = Program(
            *("-m", "gunicorn", "--worker-class=gevent", "--no-control-socket"),
            *("--config=python:tests.gevent_gunicorn", f"--bind=fd://{listener.fileno()}"),
            "tests.flask_shop:create_app()",
            dsn=dsn,
            cwd=ROOT,
            descriptors=[listener.fileno()],
            SHOP_DELIVERY="outbox",
        )
        served = Served(program, port)
        tabs: list[Tab] = []
        try:
            process = int(served.request())
            tabs += [Tab(port) for _ in range(20)]
            item = served.request("POST")
            served.read_until(lambda: f"shop item {item} 1" in served.heard[process])
            assert [tab.wait(1) for tab in tabs] == [[int(item)]] * len(tabs)
            assert served.heard == {process: ["connected", f"shop item {item} 1"]}
        finally:
            for tab in tabs:
                tab.close()
            served.end()
