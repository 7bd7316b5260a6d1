"""No password shows in anything that pgsignals prints, logs or raises."""

# ruff: noqa: T201
from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

import psycopg2
import pytest
from click.testing import CliRunner

import pgsignals
from pgsignals import Hub, PgSignalsError
from pgsignals.cli import main
from pgsignals.testing import Server
from tests.conftest import DEADLINE, Database, Recorder
from tests.forked import run
from tests.paths import ROOT
from tests.proxy import Proxy

# Each of its parts has the word that is looked for: parts are what a DSN that lacks the quoting
# would give away.
WORD = "nightingale"
PLAIN = WORD
SPECIAL = f"{WORD}1@{WORD}2/{WORD}3:{WORD}4% {WORD}5"


@pytest.fixture(scope="module", params=[PLAIN, SPECIAL], ids=["plain", "special"])
def guarded(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with a password that shall show nowhere, and a table."""
    with Server(password=request.param) as server:
        db = Database(server.dsn())
        db("CREATE TABLE items (id bigserial PRIMARY KEY)")
        db.connection.close()
        yield server


def password_of(server: Server) -> str:
    """The password in use."""
    assert server._password is not None
    return server._password


def good(server: Server) -> list[str]:
    """DSNs that work."""
    url = server.dsn()
    password = password_of(server)
    where = f"host=127.0.0.1 port={server.port} user=postgres dbname=postgres"
    return [
        url,
        url.replace("postgresql:", "postgresql+psycopg2:"),
        f"postgresql://postgres@127.0.0.1:{server.port}/postgres?password={quote(password)}",
        f"{where} password='{password}'",
    ]


def bad(server: Server) -> list[str]:
    """DSNs that fail, each in another way."""
    url = server.dsn()
    password = password_of(server)
    port = server.port
    return [
        url.replace("@127", "x@127"),
        server.dsn("nowhere"),
        server.dsn("postgres", "nobody", password),
        url.replace("127.0.0.1", "no-such-host.invalid"),
        url.replace(str(port), "1"),
        url.replace(str(port), "x"),
        f"{url}?sslmode=require",
        f"{url}?sslmode=nonsense",
        f"{url}?nonsense=1",
        f"{url}?password={quote_plus(password)}=",
        f"{url}%zz",
        url.replace("postgresql:/", "postgresql:"),
        url.replace("postgresql:", "mysql:"),
        url.replace("127.0.0.1", "[127.0.0.1"),
        f"postgresql://postgres:{password}@127.0.0.1:{port}x/postgres",
        f"postgresql://postgres:{password}/postgres",
        f"host=127.0.0.1 port={port} user=postgres password={password}{password} x",
        f"host=127.0.0.1 port={port} user=postgres password='{password}",
        f"host=127.0.0.1 port={port} user=postgres password {password}",
        f"service=none password='{password}'",
        f"host=127.0.0.1 port={port} dbname='{url}'",
        f"password='{password}'\udcff",
        password,
    ]


def show(error: BaseException | None) -> None:
    """Print an error in every way, with all that led to it, whether or not Python would."""
    if error is None:
        return
    traceback.print_exception(error)
    print(repr(error), str(error), error.args, vars(error))
    show(error.__cause__)
    show(error.__context__)


class Everything(logging.Handler):
    """Prints all that is in a log record."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), vars(record))
        if record.exc_info:
            show(record.exc_info[1])


def show_objects() -> None:
    """Print all objects of pgsignals and psycopg2 that there are."""
    for found in gc.get_objects():
        module = getattr(type(found), "__module__", None)
        if isinstance(module, str) and module.partition(".")[0] in ("pgsignals", "psycopg2"):
            print(repr(found), str(found))
            if isinstance(found, psycopg2.extensions.connection):
                print(found.dsn, None if found.closed else found.info.dsn_parameters)


def live_through(dsn: str, port: int) -> None:
    """Start, lose the connection, get it back, and stop."""
    got, gaps, refused = Recorder(), Recorder(), threading.Event()

    class Refused(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "still not connected" in record.getMessage():
                refused.set()

    log = logging.getLogger("pgsignals")
    log.addHandler(handler := Refused())
    with Proxy("127.0.0.1", port) as proxy, Hub() as hub:
        hub.subscribe(got, "items")
        hub.subscribe(raises, "items")
        hub.on_gap(gaps)
        hub.receiver_failed.connect(lambda hub, error, **_: show(error), weak=False)
        hub.disconnected.connect(lambda hub, error: show(error), weak=False)
        hub.start(dsn.replace(str(port), str(proxy.port)), ["items"])
        db = Database(pgsignals.postgres.dsn.libpq_dsn(dsn))
        db("INSERT INTO items DEFAULT VALUES")
        print(got.wait(1), hub, hub.status())
        for mistake in (
            lambda: hub.start(dsn, ["items"]),
            lambda: hub.wait_for("items", timeout=0.01),
            lambda: Hub().start(dsn, ["no_such_table"]),
            lambda: Hub().start(dsn, [pgsignals.watch("items", when="nonsense")]),
            lambda: Hub().start({"dsn": dsn}, ["items"]),  # type: ignore[arg-type]
            lambda: Hub().start(dsn, ["items"], listen_dsn=f"{dsn}x x"),
        ):
            with pytest.raises((PgSignalsError, psycopg2.Error)) as caught:
                mistake()
            show(caught.value)
        proxy.refuse()
        proxy.cut()
        assert refused.wait(DEADLINE)
        with pytest.raises(PgSignalsError) as caught:
            hub.status()
        show(caught.value)
        show_objects()
        proxy.accept()
        print(gaps.wait(1))
        show_objects()
        db.connection.close()
    log.removeHandler(handler)


def raises(event: object) -> None:
    """A receiver that fails."""
    raise RuntimeError("on purpose")


def fail_with(dsn: str) -> None:
    """Give a DSN that does not work wherever one can be given."""
    with pytest.raises(PgSignalsError) as caught:
        Hub().start(dsn, ["items"])
    show(caught.value)
    commands = ("status", "doctor", "sql items", "install items", "uninstall", "watch items")
    for command in commands:
        calls: list[tuple[list[str], dict[str, str]]] = [
            ([*command.split(), "--dsn", dsn], {}),
            (command.split(), {"PGSIGNALS_DSN": dsn}),
        ]
        if "://" in dsn:
            calls.append(([*command.split(), dsn], {}))  # In the wrong place.
        for arguments, environment in calls:
            result = CliRunner().invoke(main, ["-v", *arguments], env=environment)
            print(command, result.exit_code, result.output)
            assert result.exit_code in (1, 2)
            show(result.exception)


def everything(port: str, goods: str, bads: str) -> None:
    """What the other process does, with DSNs that are in the environment, a line for each."""
    logging.basicConfig(level=logging.DEBUG, handlers=[Everything()])
    for dsn in os.environ[goods].splitlines():
        live_through(dsn, int(port))
    for dsn in os.environ[bads].splitlines():
        fail_with(dsn)
    print("all done")


def test_a_process_that_prints_everything(guarded: Server) -> None:
    """Log records, errors with all that led to them, and every object, through good and bad."""
    module = "tests.processes.test_canary"
    script = f"import sys; from {module} import everything; everything(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", script, str(guarded.port), "GOOD", "BAD"],
        env={
            **os.environ,
            "GOOD": "\n".join(good(guarded)),
            "BAD": "\n".join(bad(guarded)),
            "PYTHONIOENCODING": "utf-8:backslashreplace",
        },
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for landmark in ("still not connected", "connected again", "on purpose", "all done"):
        assert landmark in done.stdout
    assert found_in(done.stdout) == []


@pytest.mark.parametrize("command", ["status", "doctor", "sql items", "watch items --timeout 0.2"])
def test_commands(guarded: Server, command: str) -> None:
    """What a command prints with a DSN that works, given either way."""
    dsn = guarded.dsn()
    for result in (
        run("-v", *command.split(), dsn=dsn),
        run("-v", *command.split(), "--dsn", dsn),
    ):
        assert result.out or result.err
        assert found_in("\n".join([*result.out, *result.err])) == []


def found_in(text: str) -> list[str]:
    """The lines in which a part of the password is."""
    return [line for line in text.splitlines() if WORD in line.lower()]
