"""The newcomers' paths: what the pages print is run as it stands, in an empty directory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from psycopg2.extensions import parse_dsn
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import pgsignals
from pgsignals import Hub
from tests.browser import chromium
from tests.conftest import DEADLINE, Database, Recorder
from tests.paths import ROOT

DOCS = ROOT / "docs"
# A block; or what a reader is asked to do otherwise.
STEP = re.compile(
    r"^```(?P<kind>sh|python|text|html)\n(?P<block>.*?)^```$"
    r"|^Open <(?P<url>\S+)>|(?P<interrupt>Press Ctrl-C|Stop the server with Ctrl-C)",
    re.DOTALL | re.MULTILINE,
)
# What a block of code begins with: where it belongs.
PLACE = re.compile(r"(?:# |<!-- )(\S+\.(?:py|html))(?:, (at the end|its last lines))?(?: -->)?")
# What a reader has to do once, and this machine has done.
PREPARATION = re.compile(r"(python3 -m venv|\. venv/bin/activate|pip install|export PG)")
SERVERS = re.compile(
    r"(python manage.py pgsignals listen|uvicorn|flask run|python (mailer|listen).py)"
)


class Reader:
    """Somebody who does what a page says, in an empty directory."""

    def __init__(self, directory: Path, dsn: str) -> None:
        self.directory = directory
        self.lines = Recorder()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        given = parse_dsn(dsn)
        names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PG", "DJANGO_"))},
            **{variable: given[name] for name, variable in names.items()},
            # Where the pages say 8000 or 5000, which somebody may have on this machine.
            "UVICORN_PORT": str(self.port),
            "FLASK_RUN_PORT": str(self.port),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self._database = Database(dsn)
        self._servers: list[subprocess.Popen[str]] = []
        self._codes: list[int] = []

    def follow(self, page: str, section: str) -> None:
        """Do all that a section says, and see what it shows."""
        text = (DOCS / page).read_text()
        [part] = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        for step in STEP.finditer(part):
            if step["url"]:
                self.visit()
            elif step["interrupt"]:
                self._interrupt(self._servers[-1])
            elif step["kind"] in ("python", "html"):
                self._write(step["block"])
            elif step["kind"] == "sh":
                for line in step["block"].splitlines():
                    self._type(line)
            else:
                self._see(step["block"].splitlines())

    def visit(self) -> None:
        """Look at the page; a test that has a browser does."""

    def _see(self, expected: list[str]) -> None:
        seen = self.lines.wait_until(lambda line: line == expected[-1])
        assert seen[-len(expected) :] == expected

    def _write(self, block: str) -> None:
        head, _, code = block.partition("\n")
        place = PLACE.fullmatch(head)
        assert place is not None, head
        name, how = place.groups()
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        if how == "its last lines":
            # Those from the one that begins as they do.
            kept = path.read_text()
            path.write_text(kept[: kept.index(code[:20])] + code)
        else:
            with path.open("a" if how else "w") as file:
                file.write(f"{code}\n")

    def _type(self, line: str) -> None:
        if PREPARATION.match(line):
            return
        if (statement := re.fullmatch('psql -c "(.*)"', line)) is not None:
            self._database(statement[1])
            return
        if SERVERS.match(line):
            self._serve(line)
            return
        done = subprocess.run(
            ["bash", "-ec", line],
            cwd=self.directory,
            env=self._environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"

    def _serve(self, line: str) -> None:
        process = subprocess.Popen(
            ["bash", "-ec", f"exec {line}"],
            cwd=self.directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._servers.append(process)
        started = Recorder()

        def record(line: str) -> None:
            self.lines(line)
            started(line)

        pump(process, record)
        # What tells a reader that it is time for the other terminal.
        ready = re.compile("Listening\\.|running on", re.IGNORECASE)
        started.wait_until(lambda line: ready.search(line) is not None)

    def _interrupt(self, process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGINT)
        self._codes.append(process.wait(DEADLINE))

    def close(self) -> None:
        """Press Ctrl-C where something runs; it ends well."""
        for process in self._servers:
            if process.poll() is None:
                self._interrupt(process)
        self._database.connection.close()
        assert all(code in (0, -signal.SIGINT, 130) for code in self._codes), self.lines.items
        # Ctrl-C may come before a program that says that it listens has come to wait for it.
        told = [line for line in self.lines.items if line.startswith("Traceback")]
        assert len(told) == self.lines.items.count("KeyboardInterrupt"), self.lines.items


def pump(process: subprocess.Popen[str], lines: Callable[[str], object]) -> None:
    """Record what a process prints, until it ends."""

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines(line.rstrip("\n"))

    threading.Thread(target=read, daemon=True).start()


@pytest.fixture
def reader(tmp_path: Path, dsn: str) -> Iterator[Reader]:
    """A reader in an empty directory, with an empty database."""
    made = Reader(tmp_path, dsn)
    yield made
    made.close()


def test_script(reader: Reader) -> None:
    """From an empty directory to the first event in a plain script."""
    reader.follow("quickstart.md", "From an empty directory")


def test_django(reader: Reader) -> None:
    """From an empty directory to the first events in Django."""
    reader.follow("django.md", "From an empty directory")


def test_fastapi(reader: Reader) -> None:
    """From an empty directory to the first event in FastAPI, in the server and in a browser."""
    with httpx.Client(timeout=DEADLINE) as client:
        original = reader._type

        def type_(line: str) -> None:
            if line.startswith("psql") and "INSERT" in line:
                with client.stream("GET", f"http://127.0.0.1:{reader.port}/events") as browser:
                    lines = browser.iter_lines()
                    next(lines)
                    original(line)
                    assert "data: Hello" in iter(lines)
            else:
                original(line)

        reader._type = type_  # type: ignore[method-assign]
        reader.follow("asyncio.md", "FastAPI, from an empty directory")


# What the page shows after each statement of the section; it is not loaded again.
SHOWN = {
    "UPDATE orders SET status = 'paid' WHERE customer = 'Ann'": ["1 Ann paid", "2 Bob new"],
    "INSERT INTO orders (customer) VALUES ('Cleo'), ('Dan')": [
        "1 Ann paid", "2 Bob new", "3 Cleo new", "4 Dan new",
    ],
    "DELETE FROM orders WHERE customer = 'Bob'": ["1 Ann paid", "3 Cleo new", "4 Dan new"],
}  # fmt: skip


def test_the_tutorial(reader: Reader) -> None:
    """From an empty directory to a page that changes by itself, in a browser, and an outbox."""
    with chromium() as browser:
        page = browser.new_page()
        errors: list[object] = []
        page.on("pageerror", lambda error: errors.append(error))

        def shows(rows: list[str]) -> None:
            page.wait_for_function(
                "rows => [...document.querySelectorAll('#orders tr')].map(row =>"
                " [...row.cells].map(cell => cell.textContent).join(' ')).join() === rows.join()",
                arg=rows,
                timeout=DEADLINE * 1000,
            )

        def visit() -> None:
            with (
                page.expect_event("response", lambda response: "/events" in response.url)
                if ("EventSource" in (reader.directory / "templates/orders.html").read_text())
                else contextlib.nullcontext()
            ):
                page.goto(f"http://127.0.0.1:{reader.port}")

        original = reader._type

        def type_(line: str) -> None:
            original(line)
            statement = line.removeprefix('psql -c "').removesuffix('"')
            if statement in SHOWN:
                shows(SHOWN.pop(statement))

        reader.visit = visit  # type: ignore[method-assign]
        reader._type = type_  # type: ignore[method-assign]
        for section in ("A page", "It changes by itself"):
            reader.follow("tutorial.md", section)
        assert not SHOWN
        # A fetch that fails is not the last one.
        page.route(re.compile(r":\d+/$"), lambda route: route.abort())
        with page.expect_event("requestfailed", timeout=DEADLINE * 1000):
            original("psql -c \"UPDATE orders SET customer = 'Anna' WHERE id = 1\"")
        page.unroute_all()
        original("psql -c \"UPDATE orders SET status = 'sent' WHERE id = 1\"")
        shows(["1 Anna sent", "3 Cleo new", "4 Dan new"])
        for section in ("Only what matters", r"What if the process is down\?"):
            reader.follow("tutorial.md", section)
        assert sum("Dear" in line for line in reader.lines.items) == 2
        assert [str(error) for error in errors] == ["Failed to fetch"]


class Base(orm.DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    lines: orm.Mapped[list[Line]] = orm.relationship()


class Line(Base):
    __tablename__ = "lines"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    order_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey(Order.id))


class Shop:
    """The module ``pgsignals`` of the pages, acting on a Hub of the test's."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hub, name, None) or getattr(pgsignals, name)


def block(page: str, text: str) -> str:
    """The first block of Python in a page that has ``text`` in it."""
    found = re.findall(r"^ *```python\n(.*?)^ *```$", (DOCS / page).read_text(), re.S | re.M)
    return str(next(each for each in found if text in each))


def test_the_blocks_of_sqlalchemy(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """An engine for start, a batch with what belongs to it, and a coroutine that loads."""
    engine = sa.create_engine(dsn.replace("postgresql://", "postgresql+psycopg2://"))
    async_engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"))
    Base.metadata.create_all(engine)
    names: dict[str, Any] = {
        "pgsignals": Shop(hub),
        "create_engine": lambda url: engine,
        "engine": engine,
        "async_engine": async_engine,
        "Order": Order,
        "Session": orm.Session,
        "AsyncSession": AsyncSession,
        "selectinload": orm.selectinload,
        "index": lambda orders: recorder([len(order.lines) for order in orders]),
    }
    exec(block("sqlalchemy.md", "def reindex"), names)
    exec(block("sqlalchemy.md", "async def ordered"), names)
    loaded = Recorder()

    async def main() -> None:
        hub.on(Order, "inserted")(names["ordered"])
        exec(block("sqlalchemy.md", "create_engine"), names)
        hub.subscribe(loaded, Order, "updated")
        await asyncio.to_thread(
            db, "INSERT INTO orders VALUES (1); INSERT INTO lines VALUES (1, 1)"
        )
        await asyncio.to_thread(db, "UPDATE orders SET id = id")
        await asyncio.to_thread(loaded.wait, 1)
        assert await hub.astop()
        await async_engine.dispose()

    failures = Recorder()
    hub.receiver_failed.connect(lambda *_, **details: failures(details), weak=False)
    asyncio.run(main())
    engine.dispose()
    assert recorder.items == [[1]]
    assert failures.items == []


def test_the_blocks_of_asyncio(hub: Hub, dsn: str, db: Database, recorder: Recorder) -> None:
    """Coroutine functions, starting without holding up the loop, and iterating."""
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"))
    db("CREATE TABLE orders (id int PRIMARY KEY)")

    class Single(orm.DeclarativeBase):
        pass

    class Order(Single):
        __tablename__ = "orders"
        id: orm.Mapped[int] = orm.mapped_column(primary_key=True)

    async def tell_the_kitchen(order: Order) -> None:
        recorder(order.id)

    async def serve() -> None:
        await asyncio.to_thread(db, "INSERT INTO orders VALUES (1)")
        await asyncio.to_thread(recorder.wait, 1)

    names: dict[str, Any] = {
        "pgsignals": Shop(hub),
        "Order": Order,
        "engine": engine,
        "AsyncSession": AsyncSession,
        "serve": serve,
        "tell_the_kitchen": tell_the_kitchen,
        "asyncio": asyncio,
        "dsn": dsn,
        "watchers": [Order],
        "print": recorder,
    }
    first = block("asyncio.md", "async def main").replace("postgresql://localhost/shop", dsn)
    exec(first, names)

    async def main() -> None:
        await names["main"]()
        assert not hub.running
        starting = block("asyncio.md", "to_thread")
        exec("async def start():\n" + re.sub("^", "    ", starting, flags=re.M), names)
        await names["start"]()
        iterating = block("asyncio.md", "async with pgsignals.stream")
        exec("async def read():\n" + re.sub("^", "    ", iterating, flags=re.M), names)
        reading = asyncio.ensure_future(names["read"]())
        # One turn of the loop, in which the stream is opened.
        await asyncio.sleep(0)
        await asyncio.to_thread(db, "UPDATE orders SET id = 2")
        await asyncio.to_thread(recorder.wait, 2)
        await hub.astop()
        await reading
        await engine.dispose()

    asyncio.run(main())
    assert recorder.items[1].id == 2


@pytest.mark.parametrize(
    ("prepare", "statement", "expected"),
    [
        ("", "BEGIN; SELECT set_config('pgsignals.muted', 'on', true); {}; COMMIT", [2]),
        ("", "SET pgsignals.muted = 'on'; {}; RESET pgsignals.muted", [2]),
        ("", "SET session_replication_role = replica; {}; RESET session_replication_role", [2]),
        (
            "ALTER TABLE items DISABLE TRIGGER USER",
            "{}; ALTER TABLE items ENABLE TRIGGER USER",
            [2],
        ),
    ],
)
def test_silencing(
    hub: Hub,
    dsn: str,
    db: Database,
    recorder: Recorder,
    prepare: str,
    statement: str,
    expected: list[int],
) -> None:
    """Each way to silence watchers that the page lists does, and ends as it says."""
    db("CREATE TABLE items (id int PRIMARY KEY)")
    hub.subscribe(recorder, "items")
    hub.start(dsn, ["items"])
    if prepare:
        db(prepare)
    db(statement.format("INSERT INTO items VALUES (1)"))
    db("INSERT INTO items VALUES (2)")
    assert [event.id for event in recorder.wait(1)] == expected


def test_silencing_a_role(
    hub: Hub, dsn: str, db: Database, recorder: Recorder, connect: Any
) -> None:
    """A role may be silenced for good, and what it writes is not heard."""
    db("CREATE TABLE items (id int PRIMARY KEY)")
    name = f"importer_{os.getpid()}"
    db(f"CREATE ROLE {name} LOGIN; GRANT ALL ON items TO {name}")
    db(f"ALTER ROLE {name} SET pgsignals.muted = 'on'")
    hub.subscribe(recorder, "items")
    hub.start(dsn, ["items"])
    connect(re.sub("//postgres@", f"//{name}@", dsn))("INSERT INTO items VALUES (1)")
    db("INSERT INTO items VALUES (2)")
    assert [event.id for event in recorder.wait(1)] == [2]


def test_replicated_watchers_hear_a_replica_session(
    hub: Hub, dsn: str, db: Database, recorder: Recorder
) -> None:
    """session_replication_role does not silence a watcher with replicated=True; muting does."""
    db("CREATE TABLE items (id int PRIMARY KEY)")
    hub.subscribe(recorder, "items")
    hub.start(dsn, [pgsignals.watch("items", "inserted", replicated=True)])
    db("SET session_replication_role = replica; SET pgsignals.muted = 'on'")
    db("INSERT INTO items VALUES (1)")
    db("RESET pgsignals.muted")
    db("INSERT INTO items VALUES (2)")
    assert [event.id for event in recorder.wait(1)] == [2]
