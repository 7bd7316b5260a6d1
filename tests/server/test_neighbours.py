"""The state of a program that uses the library, and of a writer's session, stays as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

import pgsignals
from pgsignals.core.rng import chance
from pgsignals.hub.hub import Delivery
from tests.commands import Program
from tests.conftest import Database

# Each use below draws by chance: pauses between tries, claims, and when to tidy up.
USE = """
import asyncio, decimal, gc, json, locale, logging, os, random, signal, socket, sys, threading, time
import warnings

# What the library is made of may change what it likes.
import blinker, click, msgspec, pluggy, psycopg2, psycopg2.extensions, psycopg2.extras

def state():
    try:
        import numpy
        numbers = repr(numpy.random.get_state())
    except ImportError:
        numbers = ""
    return {
        "random": repr(random.getstate()),
        "numpy": numbers,
        "locale": locale.setlocale(locale.LC_ALL),
        "signals": [repr(signal.getsignal(number)) for number in signal.valid_signals()],
        "wakeup": signal.set_wakeup_fd(signal.set_wakeup_fd(-1)),
        "masked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "warnings": repr(warnings.filters) + repr(warnings.showwarning),
        "root logger": repr((logging.root.handlers, logging.root.filters, logging.root.level,
                             logging.root.manager.disable, logging.lastResort,
                             logging.raiseExceptions, logging.getLogRecordFactory(),
                             logging.getLoggerClass())),
        "decimal": repr((decimal.getcontext(), decimal.DefaultContext)),
        "socket": repr((socket.getdefaulttimeout(), socket.socket, socket.getaddrinfo)),
        "environment": dict(os.environ),
        "time zone": time.tzname,
        "folder": os.getcwd(),
        "umask": os.umask(os.umask(0)),
        "path": list(sys.path),
        "hooks": repr((sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook,
                       sys.gettrace(), sys.getprofile(), threading._profile_hook)),
        "interpreter": repr((sys.getswitchinterval(), sys.getrecursionlimit(), gc.isenabled(),
                             gc.get_threshold(), gc.callbacks, threading.stack_size())),
        "loop": repr(asyncio.get_event_loop_policy().__class__),
        "streams": repr((sys.stdin, sys.stdout, sys.stderr)),
        "types": repr((psycopg2.extensions.string_types, psycopg2.extensions.adapters,
                       psycopg2.extensions.get_wait_callback())),
    }

random.seed(7)
before = state()
told = threading.Event()

import pgsignals
from pgsignals.outbox import housekeeping

housekeeping.EVERY_SECONDS = 0.01
with pgsignals.Hub() as hub:
    hub.on("items", "inserted")(lambda event: told.set())
    hub.connected.connect(lambda *a, **k: again.set(), weak=False)
    again = threading.Event()
    options = {} if sys.argv[1] == "notify" else {"name": "mailer"}
    if sys.argv[1] == "outbox":
        options["partitions"] = 2
    hub.start(os.environ["PGSIGNALS_DSN"], ["items"], delivery=sys.argv[1], **options)
    again.wait()
    again.clear()
    with psycopg2.connect(os.environ["PGSIGNALS_DSN"]) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                           " WHERE application_name = 'pgsignals'")
    again.wait()
    with connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO items DEFAULT VALUES")
    connection.close()
    told.wait()
    hub.status()
after = state()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""


@pytest.fixture
def items(each_db: Database) -> Database:
    """A table."""
    each_db("CREATE TABLE items (id bigserial PRIMARY KEY)")
    return each_db


def test_the_state_of_the_program(delivery: Delivery, items: Database) -> None:
    """Importing and using the library changes nothing that is the whole process's, ``random``
    least of all."""
    program = Program("-c", USE, delivery, dsn=items.dsn)
    try:
        assert json.loads(program.out()) == []
    finally:
        program.process.kill()
        program.process.wait()


def test_the_state_of_a_writer(
    hub: pgsignals.Hub, delivery: Delivery, items: Database, connect: Callable[[str], Database]
) -> None:
    """A session that has seeded ``random()`` gets its own numbers while it writes."""

    def drawn(writing: bool) -> list[tuple[float]]:
        writer = connect(items.dsn)
        writer("SELECT setseed(0.5)")
        found = []
        for _ in range(100):
            if writing:
                writer("INSERT INTO items DEFAULT VALUES")
            found += writer("SELECT random()")
        return found

    alone = drawn(writing=True)
    name = {} if delivery == "notify" else {"name": "mailer"}
    hub.start(items.dsn, ["items"], delivery=delivery, **name)  # type: ignore[arg-type]
    assert drawn(writing=True) == alone
    # While no consumer lives, writers look after the outbox themselves.
    assert hub.stop()
    assert drawn(writing=True) == alone


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_chance_after_a_fork() -> None:
    """A child does not draw what its parent draws, whoever forks."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, chance.random().hex().encode())
        os._exit(0)
    os.waitpid(child, 0)
    with os.fdopen(reading, closefd=True) as pipe:
        os.close(writing)
        assert pipe.read() != chance.random().hex()
