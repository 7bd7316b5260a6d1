"""The examples, run as their READMEs say, against real servers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from tests.conftest import DEADLINE, Database, Recorder
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"
SECRET = "whsec_" + base64.b64encode(b"a secret of 24 bytes ok!").decode()


@pytest.fixture
def shop(db: Database) -> Database:
    """The tables of the examples."""
    db((EXAMPLES / "schema.sql").read_text())
    return db


class Example:
    """An example that runs in a process of its own."""

    def __init__(self, script: str, *arguments: str, **environment: str) -> None:
        self.lines = Recorder()
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._pump = threading.Thread(target=self._read)
        self._pump.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines(line.rstrip("\n"))

    def wait_for(self, text: str) -> list[str]:
        """All lines up to the first with ``text`` in it."""
        return self.lines.wait_until(lambda line: text in line)

    def say(self, text: str) -> None:
        """Write a line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def interrupt(self) -> str:
        """Press Ctrl-C; its stderr, once it has ended well."""
        assert self.process.stderr is not None
        self.process.send_signal(signal.SIGINT)
        errors = self.process.stderr.read()
        assert self.process.wait(DEADLINE) == 0, errors
        assert "KeyboardInterrupt" not in errors
        return errors

    def close(self) -> None:
        """End it, however it stands."""
        self.process.kill()
        self._pump.join(DEADLINE)
        self.process.wait(DEADLINE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def start(dsn: str) -> Iterator[Callable[..., Example]]:
    """Starts examples on the database, by the variable PGSIGNALS_DSN."""
    started: list[Example] = []

    def start(script: str, *arguments: str, **environment: str) -> Example:
        started.append(Example(script, *arguments, PGSIGNALS_DSN=dsn, **environment))
        return started[-1]

    yield start
    for example in started:
        example.close()


def test_ten_lines(shop: Database, start: Callable[..., Example]) -> None:
    """Each change is a line; Ctrl-C ends it quietly."""
    example = start("ten_lines.py")
    example.wait_for("watching")
    shop("INSERT INTO orders (customer, total) VALUES ('Ann', 1)")
    shop("UPDATE orders SET status = 'paid'")
    shop("DELETE FROM orders")
    assert example.wait_for("deleted")[1:] == [
        "inserted 1 {'customer': 'Ann', 'status': 'new'}",
        "updated 1 {'customer': 'Ann', 'status': 'paid'}",
        "deleted 1 {'customer': 'Ann', 'status': 'paid'}",
    ]
    assert example.interrupt() == ""


def test_the_connection_string_may_be_an_argument(shop: Database, dsn: str) -> None:
    """Without PGSIGNALS_DSN the first argument says which database."""
    example = Example("ten_lines.py", dsn, PGSIGNALS_DSN="postgresql://nowhere.invalid/")
    try:
        example.wait_for("watching")
    finally:
        example.close()


def test_live_page(shop: Database, start: Callable[..., Example]) -> None:
    """The table is drawn at the start and again whenever orders change, TRUNCATE included."""
    shop("INSERT INTO orders (customer, total) VALUES ('Ann', 12.50)")
    example = start("live_page/live_page.py")
    example.wait_for("Ann")
    shop("INSERT INTO orders (customer, total) SELECT 'Bob', n FROM generate_series(1, 1000) n")
    page = example.wait_for("Bob")[-3:]
    assert page[1].split() == ["order", "customer", "total", "status"]
    shop("UPDATE orders SET status = 'shipped'")
    example.wait_for("shipped")
    shop("TRUNCATE orders")
    example.lines.wait_until(lambda line: example.lines.items[-2:] == [page[1], ""])
    assert example.interrupt() == ""


class Mailbox:
    """What a mail server has received."""

    def __init__(self) -> None:
        self.mails = Recorder()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        self.mails(envelope)
        return "250 OK"


@pytest.fixture
def mail_server() -> Iterator[tuple[Mailbox, Controller]]:
    """An SMTP server on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    mailbox = Mailbox()
    controller = Controller(mailbox, hostname="127.0.0.1", port=port)
    controller.start()
    yield mailbox, controller
    controller.stop()


def test_email_on_update(
    shop: Database, start: Callable[..., Example], mail_server: tuple[Mailbox, Controller]
) -> None:
    """Both addresses are told of a change, and of nothing else."""
    mailbox, controller = mail_server
    shop("INSERT INTO users (name, email) VALUES ('Ann', 'a@example.org'), ('Bob', 'b@x.org')")
    example = start(
        "email_on_update/email_on_update.py",
        SMTP_HOST="127.0.0.1",
        SMTP_PORT=str(controller.port),
    )
    example.wait_for("watching")
    shop("UPDATE users SET name = 'Anna', email = email WHERE id = 1")
    shop("UPDATE users SET email = 'new@example.org' WHERE id = 1")
    [envelope] = mailbox.mails.wait(1)
    assert sorted(envelope.rcpt_tos) == ["a@example.org", "new@example.org"]
    mail = message_from_bytes(envelope.content)
    assert mail["Subject"] == "Your e-mail address was changed"
    assert "Dear Anna" in mail.get_payload()
    example.wait_for("told user 1")
    assert example.interrupt() == ""


def test_email_survives_a_dead_mail_server(shop: Database, start: Callable[..., Example]) -> None:
    """A mail that cannot be sent is logged, and the program goes on."""
    shop("INSERT INTO users (name, email) VALUES ('Ann', 'a@example.org')")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    example = start(
        "email_on_update/email_on_update.py", SMTP_HOST="127.0.0.1", SMTP_PORT=str(port)
    )
    example.wait_for("watching")
    shop("UPDATE users SET email = 'b@example.org'")
    assert example.process.stderr is not None
    assert "ConnectionRefusedError for public.users" in example.process.stderr.readline()
    assert example.process.poll() is None


def test_cache(shop: Database, start: Callable[..., Example]) -> None:
    """A record is kept until it changes, and none over a lost connection."""
    shop("INSERT INTO users (name, email) VALUES ('Ann', 'a'), ('Bob', 'b')")
    example = start("cache/cache.py")
    example.wait_for("please")
    for line in ("1", "1", "2"):
        example.say(line)
    example.wait_for("Bob")
    shop("UPDATE users SET name = 'Anna' WHERE id = 1")
    example.wait_for("forgot 1")
    example.say("1")
    example.wait_for("Anna")
    example.say("2")
    assert example.lines.wait(7)[1:] == [
        "miss ('Ann', 'a')",
        "hit ('Ann', 'a')",
        "miss ('Bob', 'b')",
        "forgot 1",
        "miss ('Anna', 'a')",
        "hit ('Bob', 'b')",
    ]
    shop(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'pgsignals' AND datname = current_database()"
    )
    example.wait_for("forgot all: reconnected")
    example.say("2")
    assert example.lines.wait(9)[-1] == "miss ('Bob', 'b')"
    example.interrupt()


def test_cache_keeps_nothing_that_changed_while_it_was_read() -> None:
    """A record that is forgotten during its load is loaded again the next time."""
    sys.path.insert(0, str(EXAMPLES / "cache"))
    try:
        from cache import Cache  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    rows = iter(["old", "new"])

    def load(user_id: int) -> str:
        row = next(rows)
        if row == "old":
            cache.forget(
                user_id
            )  # the change is committed and heard while the old row is on its way
        return row

    cache = Cache(load)
    cache.connect()
    assert [cache.get(1) for _ in range(3)] == [("old", False), ("new", False), ("new", True)]


class Endpoint(BaseHTTPRequestHandler):
    """An HTTP service that answers as it is told, and remembers what it was sent."""

    answers: list[int]
    requests: Recorder

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.answers.pop(0) if self.answers else 204)
        self.end_headers()
        self.requests((self.headers, body))

    def log_message(self, *arguments: object) -> None:
        """Be quiet."""


@pytest.fixture
def service() -> Iterator[tuple[str, type[Endpoint]]]:
    """The URL of an HTTP service, and its handler."""

    class Handler(Endpoint):
        answers = []  # noqa: RUF012
        requests = Recorder()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/hook", Handler
        server.shutdown()
        thread.join(DEADLINE)


def test_webhook(
    shop: Database, start: Callable[..., Example], service: tuple[str, type[Endpoint]]
) -> None:
    """A webhook is signed, repeated with the same id until it is taken, and then no more."""
    url, handler = service
    handler.answers += [503, 429, 204, 400]
    example = start("webhook/webhook.py", url, WEBHOOK_SECRET=SECRET)
    example.wait_for("posting")
    shop("INSERT INTO orders (customer, total) VALUES ('Ann', 12.50)")
    tries = handler.requests.wait(3)
    shop("UPDATE orders SET status = 'refused for good'")
    handler.requests.wait(4)
    shop("DELETE FROM orders")
    *_, refused, deleted = handler.requests.wait(5)
    example.interrupt()

    assert len({headers["webhook-id"] for headers, _ in tries}) == 1
    assert len({body for _, body in tries}) == 1
    for headers, body in (*tries, refused, deleted):
        timestamp = headers["webhook-timestamp"]
        assert abs(time.time() - int(timestamp)) < 60
        signed = f"{headers['webhook-id']}.{timestamp}.".encode() + body
        digest = hmac.new(b"a secret of 24 bytes ok!", signed, hashlib.sha256).digest()
        assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    sent = [json.loads(body) for _, body in (tries[0], refused, deleted)]
    assert [each["type"] for each in sent] == [
        "orders.inserted", "orders.updated", "orders.deleted",
    ]  # fmt: skip
    assert sent[0]["data"]["values"] == {"customer": "Ann", "total": "12.50", "status": "new"}


def test_webhook_receiver(shop: Database, start: Callable[..., Example]) -> None:
    """The receiver that comes with it takes what is genuine and refuses the rest."""
    receiver = start("webhook/receiver.py", "0", WEBHOOK_SECRET=SECRET)
    [ready] = receiver.lines.wait(1)
    url = f"http://localhost:{ready.split()[3].rstrip(';')}/"
    other = "whsec_" + base64.b64encode(b"another secret").decode()
    forger = start("webhook/webhook.py", url, WEBHOOK_SECRET=other)
    sender = start("webhook/webhook.py", url, WEBHOOK_SECRET=SECRET)
    forger.wait_for("posting")
    sender.wait_for("posting")
    shop("INSERT INTO orders (customer, total) VALUES ('Ann', 12.50)")
    received = json.loads(receiver.lines.wait(2)[1])
    assert received["data"]["values"]["customer"] == "Ann"
    sender.interrupt()
    assert forger.process.stderr is not None
    assert "HTTPError for public.orders" in forger.process.stderr.readline()
    receiver.interrupt()
    assert len(receiver.lines.items) == 2
