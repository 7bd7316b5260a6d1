"""``pgsignals console`` and ``top`` as an operator, and a stranger, meet them."""

from __future__ import annotations

import base64
import http.client
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from flask import Flask, Response, redirect, request

from pgsignals import ConfigurationError, Event, Hub
from pgsignals.console import console as blueprint
from pgsignals.console.guards import Hosts, Login, is_loopback
from pgsignals.overview.reader import Reader
from tests.commands import run
from tests.conftest import DEADLINE, Database
from tests.console import Console, console
from tests.terminal import Terminal
from tests.waiting import eventually

PASSWORD = "correct horse battery"


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders."""
    db("CREATE TABLE orders (id bigint PRIMARY KEY, status text)")


@pytest.fixture
def letter(dsn: str, db: Database) -> Iterator[int]:
    """A dead letter of a consumer that has mended its receiver, and runs."""
    Hub().start(dsn, ["orders"], delivery="outbox", name="mailer").stop()
    hub, taken = Hub(), []

    @hub.on("orders", retries=0)
    def send(event: Event) -> None:
        if not taken:
            taken.append(event)
            raise ValueError("no price")

    with hub.start(dsn, ["orders"], delivery="outbox", name="mailer"):
        db("INSERT INTO orders VALUES (7, 'new')")
        [(number,)] = eventually(lambda: db("SELECT id FROM pgsignals.dead_letters"), bool)
        yield int(number)


def basic(password: str, user: str = "ann") -> str:
    """The header of a login."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_a_page_is_locked_down(dsn: str) -> None:
    """The page runs no script but its own, is in no frame, and is kept nowhere."""
    with console(dsn) as running:
        page = running.ask()
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["cache-control"] == "no-store"
        assert page.headers["x-content-type-options"] == "nosniff"
        cookie = page.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        # Nothing inline, and nothing from elsewhere.
        assert re.findall(r"<script(?![^>]*\bsrc=)|\sstyle=|\son\w+=|https?://", page.text) == []
        for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
            assert running.ask(path).status == 200
        end = running.end()
    assert end.code == 0
    assert not any("Traceback" in line for line in end.err)


def test_it_stays_at_home_without_a_password(dsn: str) -> None:
    """Where others can reach it, the console does not start without a password, or a short one."""
    refused = run("console", "--host", "0.0.0.0", "--port", "0", dsn=dsn)
    assert refused.code == 1
    assert "PGSIGNALS_CONSOLE_PASSWORD" in refused.err[0]
    with pytest.raises(ConfigurationError, match="fewer than 12"):
        Login("short")
    assert not is_loopback("example.org")
    assert is_loopback("::1")


def test_a_stranger_without_a_login(dsn: str, letter: int) -> None:
    """With a password nothing is told to whoever does not know it; who does is let in."""
    options = ("--host", "0.0.0.0", "--allow-actions")
    with console(dsn, *options, PGSIGNALS_CONSOLE_PASSWORD=PASSWORD) as running:
        running.url = running.url.replace("0.0.0.0", "127.0.0.1")
        for path in ("/", "/stream", f"/dead-letters/{letter}", "/static/console.js"):
            refused = running.ask(path)
            assert (refused.status, "orders" in refused.text) == (401, False)
            assert running.ask(path, Authorization=basic("wrong")).status == 401
        posted = running.ask("/dead-letters/drop", {"id": letter, "token": "x"})
        assert posted.status == 401
        found = running.ask(f"/dead-letters/{letter}", Authorization=basic(PASSWORD))
        assert (found.status, found.data["table"]) == (200, "public.orders")
        token = running.token(Authorization=basic(PASSWORD))
        given = {"id": letter, "token": token}
        dropped = running.ask("/dead-letters/drop", given, Authorization=basic(PASSWORD))
        assert dropped.data == {"done": "dropped", "count": 1}
        end = running.end()
    assert any("wrong password from 127.0.0.1" in line for line in end.err)
    assert any(f"(ann) dropped 1 dead letters: {letter}" in line for line in end.err)
    assert PASSWORD not in "\n".join(end.err)


def test_a_forged_post(dsn: str, db: Database, letter: int) -> None:
    """A POST without the page's token, or of another site's page, does nothing."""
    with console(dsn, "--allow-actions") as running:
        token = running.token()
        path = "/dead-letters/drop"
        for given in ({"id": letter}, {"id": letter, "token": "0" * 64}):
            assert running.ask(path, given).status == 403
        whole = {"id": letter, "token": token}
        assert running.stranger().ask(path, whole).status == 403
        assert running.ask(path, whole, Origin="https://evil.example").status == 403
        assert running.ask(path, whole, Sec_Fetch_Site="cross-site").status == 403
        assert running.ask(f"{path}?id={letter}&token={token}").status == 405
        assert db("SELECT count(*) FROM pgsignals.dead_letters") == [(1,)]
        for ids in ([], ["x"], ["1; DROP"], ["9" * 30]):
            assert running.ask(path, {"id": ids, "token": token}).status == 400
        assert running.ask(path, whole, Origin=running.url.rstrip("/")).status == 200
    assert db("SELECT count(*) FROM pgsignals.dead_letters") == [(0,)]


def test_it_is_read_only(dsn: str, db: Database, letter: int) -> None:
    """Unless actions are allowed, a page has no buttons for them, and asking for one is refused."""
    with console(dsn) as running:
        token = running.token()
        for action in ("retry", "drop"):
            refused = running.ask(f"/dead-letters/{action}", {"id": letter, "token": token})
            assert (refused.status, "--allow-actions" in refused.data["error"]) == (403, True)
        assert 'id="drop"' not in running.ask().text
    assert db("SELECT retry FROM pgsignals.dead_letters") == [(False,)]


def test_a_retry_arrives(dsn: str, db: Database, letter: int) -> None:
    """A dead letter that is retried is delivered again, and the log says who asked."""
    with console(dsn, "--allow-actions") as running:
        given = {"id": letter, "token": running.token()}
        assert running.ask("/dead-letters/retry", given).data["count"] == 1
        eventually(lambda: db("SELECT count(*) FROM pgsignals.dead_letters"), lambda r: r == [(0,)])
        end = running.end()
    assert any(f"127.0.0.1 retried 1 dead letters: {letter}" in line for line in end.err)


def test_a_foreign_name(dsn: str) -> None:
    """A name that leads here by somebody else's doing (DNS rebinding) is refused."""
    with console(dsn, "--hostname", "ops.internal") as running:
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            for path in ("/", "/stream", "/static/console.js"):
                assert running.ask(path, Host=host).status in (400, 421), host
        for host in ("localhost:9000", "127.0.0.1", "[::1]:80", "ops.internal", "OPS.internal:1"):
            assert running.ask(Host=host).status == 200, host


@pytest.mark.parametrize("header", ["", "a:b:c", "[::1", "1.2.3.4.5", "evil.example", "x y"])
def test_hosts_that_are_not_ours(header: str) -> None:
    """Only addresses, localhost and the names given are the console's."""
    assert not Hosts.of(["ops.internal"]).knows(header)


def test_values_are_hidden(dsn: str, db: Database) -> None:
    """What rows hold is told of only with --show-values."""
    from pgsignals import watch

    hub = Hub()

    @hub.on("orders", retries=0)
    def send(event: Event) -> None:
        raise ValueError("no price")

    watchers = [watch("orders", extra=["status"])]
    with hub.start(dsn, watchers, delivery="outbox", name="mailer"):
        db("INSERT INTO orders VALUES (7, 'top secret')")
        [(letter,)] = eventually(lambda: db("SELECT id FROM pgsignals.dead_letters"), bool)
    path = f"/dead-letters/{letter}"
    with console(dsn) as hiding, console(dsn, "--show-values") as showing:
        assert "top secret" not in hiding.ask(path).text
        assert "top secret" in showing.ask(path).text


def test_a_database_that_is_away(dsn: str) -> None:
    """The console starts without its database, says why nothing is shown, and has no password."""
    away = "postgresql://ann:hunter2hunter2@127.0.0.1:1/shop"
    with console(away) as running:
        state = first(running, "state")
        assert not state["connected"]
        assert "Cannot connect" in state["problem"]
        assert running.ask("/dead-letters/1").status == 409
        said = json.dumps(state) + running.ask("/dead-letters/1").text
        end = running.end()
    assert "hunter2" not in said + "\n".join([*end.out, *end.err])


def first(running: Console, name: str) -> dict[str, object]:
    """What the stream tells first of a part."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=DEADLINE)
    with closing(connection):
        connection.request("GET", "/stream")
        response = connection.getresponse()
        assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        text = ""
        while (found := re.search(f"event: {name}\ndata: (.*)\n\n", text)) is None:
            text += response.read1().decode()
    told: dict[str, object] = json.loads(found[1])
    return told


def test_a_port_that_is_taken(dsn: str) -> None:
    """A port that somebody has is a message, not a traceback."""
    with console(dsn) as running:
        refused = run("console", "--port", str(running.port), dsn=dsn)
    assert refused.code == 1
    assert "Take another --port" in refused.err[0]


def test_memory(dsn: str, db: Database) -> None:
    """Ten thousand events that are pushed to a tab leave the process within 5 MB."""
    with Hub().start(dsn, [("orders", "inserted")]), console(dsn) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=DEADLINE)
        with closing(connection):
            connection.request("GET", "/stream")
            response = connection.getresponse()
            status = Path(f"/proc/{running.program.process.pid}/status")

            text = ""
            # Told of once the session listens.
            while "event: state" not in text:
                text += response.read1().decode()

            def push(start: int, count: int) -> int:
                """The kilobytes that the process has when the tab has heard of all."""
                db(
                    "DO $$ BEGIN FOR n IN %s..%s LOOP INSERT INTO orders VALUES (n);"
                    " END LOOP; END $$",
                    (start, start + count - 1),
                )
                text = ""
                while f'"record":"{start + count - 1}"' not in text:
                    text = text[-200:] + response.read1().decode()
                found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
                assert found is not None
                return int(found[1])

            push(0, 1)
            before = push(1_000, 2_000)
            assert push(10_000, 10_000) - before < 5 << 10


# --- In a Flask application -----------------------------------------------------------------------


def test_a_blueprint_wants_to_know_who_may_see_it(dsn: str) -> None:
    """Without authorize=, or with one that is no function, there is no blueprint."""
    with pytest.raises(ConfigurationError, match="authorize="):
        blueprint(dsn)
    with pytest.raises(ConfigurationError, match="without parameters"):
        blueprint(dsn, authorize=True)  # type: ignore[arg-type]


def test_a_blueprint(dsn: str, db: Database, letter: int) -> None:
    """In an application, each request is authorised, and actions take the page's token."""

    def authorize() -> bool | str | Response:
        user = request.headers.get("X-User", "")
        if not user:
            return redirect("/login")  # type: ignore[return-value]
        return user if user == "ann" else False

    app = Flask(__name__)
    app.secret_key = "tests"
    made = blueprint(dsn, authorize=authorize, allow_actions=True)
    app.register_blueprint(made, url_prefix="/ops/signals")
    client = app.test_client()
    assert client.get("/ops/signals/").headers["Location"] == "/login"
    assert client.get("/ops/signals/stream", headers={"X-User": "bob"}).status_code == 403
    ann = {"X-User": "ann"}
    page = client.get("/ops/signals/", headers=ann)
    assert "/ops/signals/static/console.js" in page.text
    assert "Path=/ops/signals/" in page.headers["Set-Cookie"]
    [token] = re.findall('data-token="(.*?)"', page.text)
    data = {"id": letter, "token": token}
    assert client.post("/ops/signals/dead-letters/drop", data=data).status_code == 302
    done = client.post("/ops/signals/dead-letters/drop", data=data, headers=ann)
    assert done.json == {"done": "dropped", "count": 1}
    missing = client.get(f"/ops/signals/dead-letters/{letter}", headers=ann)
    assert missing.status_code == 409
    assert app.test_client().post("/ops/signals/check", data=data, headers=ann).status_code == 403


# --- top ------------------------------------------------------------------------------------------


def test_top_once(dsn: str, letter: int) -> None:
    """`top --once` prints what is there, and with --json the same model as one object."""
    printed = run("top", "--once", dsn=dsn)
    assert printed.code == 0
    text = "\n".join(printed.out)
    assert "1 dead letter" in text
    assert "mailer" in text
    found = json.loads(run("top", "--once", "--json", dsn=dsn).out[0])
    assert found["dead_letters"]["latest"][0]["id"] == letter
    assert {each["op"] for each in found["watchers"]} == {"inserted", "updated", "deleted"}
    with closing(Reader(dsn)) as reader:
        assert set(found) == set(reader.read().__dataclass_fields__)


def test_top_in_a_terminal(dsn: str, letter: int) -> None:
    """On a terminal it shows what there is until Ctrl-C, and leaves the screen as it was."""
    terminal = Terminal("top", dsn=dsn)
    try:
        terminal.wait_for("1 dead letter")
        terminal.press(b"\x03")
        assert terminal.end() == 0
        assert "\x1b[?1049l" in terminal.text
    finally:
        terminal.close()


def test_top_of_nothing() -> None:
    """A database that cannot be reached, and --json without --once, have their exit codes."""
    assert run("top", "--once", dsn="postgresql://127.0.0.1:1/x").code == 1
    refused = run("top", "--json", dsn="postgresql://127.0.0.1:1/x")
    assert (refused.code, "--once" in refused.err[-1]) == (2, True)
