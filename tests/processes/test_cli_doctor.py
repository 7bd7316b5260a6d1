"""``pgsignals doctor``: each thing that it finds, on servers that have it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from psycopg2.sql import SQL, Identifier

from pgsignals.testing import Server
from tests.conftest import NEWEST, Database
from tests.forked import Forked, examined, run


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders."""
    db("CREATE TABLE orders (id serial PRIMARY KEY, status text)")


def test_a_healthy_database_has_nothing_to_mend(dsn: str) -> None:
    """Every check is one line that begins with ok."""
    assert run("install", "orders", dsn=dsn).code == 0
    result = run("doctor", "orders", dsn=dsn)
    assert result.code == 0
    assert [line.split(":")[0] for line in result.out] == [
        "ok    connection",
        "ok    version",
        "ok    writable",
        "ok    pooler",
        "ok    round trip",
        "ok    queue",
        "ok    replication role",
        "ok    triggers",
        "ok    privileges",
    ]


def test_no_connection_is_the_last_finding(dsn: str) -> None:
    """Without a connection there is one failed check, and the password stays secret."""
    result = run("doctor", "--dsn=postgresql://u:secret@127.0.0.1:1/x")
    assert result.code == 1
    [line] = result.out
    assert line.startswith("fail  connection: Cannot connect")
    assert "Fix: " in line
    assert "secret" not in line


def test_missing_triggers_are_a_warning(dsn: str) -> None:
    """start() would install them, so that they fail nothing."""
    code, found = examined("orders:updated", dsn=dsn)
    assert code == 0
    assert found["triggers"]["level"] == "warn"
    assert "updated on public.orders" in found["triggers"]["message"]
    assert "pgsignals install" in found["triggers"]["fix"]


def test_drift_fails(dsn: str, db: Database) -> None:
    """A trigger that somebody has disabled is told by table and operation."""
    assert run("install", "orders:updated", dsn=dsn).code == 0
    [(name,)] = db("SELECT tgname FROM pg_trigger WHERE tgname LIKE 'pgsignals%'")
    db(SQL("ALTER TABLE orders DISABLE TRIGGER {}").format(Identifier(name)))
    code, found = examined("orders:updated", dsn=dsn)
    assert (code, found["triggers"]["level"]) == (1, "fail")
    assert "updated on public.orders (the trigger is disabled)" in found["triggers"]["message"]


def test_a_role_that_cannot_install_is_told_what_it_lacks(
    dsn: str, db: Database, server: Server
) -> None:
    """That fails as long as something is to be installed, then it is a warning."""
    name = dsn.rpartition("/")[2]
    db(SQL("CREATE ROLE {} LOGIN").format(Identifier(f"dml_{name}")))
    db("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    as_role = server.dsn(name, f"dml_{name}")
    code, found = examined("orders", dsn=as_role)
    assert (code, found["privileges"]["level"]) == (1, "fail")
    assert (
        "lacks TRIGGER on the table and lacks CREATE on schema public"
        in (found["privileges"]["message"])
    )
    assert run("install", "orders", dsn=dsn).code == 0
    code, found = examined("orders", dsn=as_role)
    assert (code, found["privileges"]["level"]) == (0, "warn")


def test_what_it_demands_is_what_install_needs(
    dsn: str, db: Database, server: Server, tmp_path: Path
) -> None:
    """TRIGGER and CREATE are enough, but for replicated=True, which takes owning the table."""
    (tmp_path / "shop.py").write_text(
        "import pgsignals\nWATCHERS = [pgsignals.watch('orders', replicated=True)]"
    )
    name = dsn.rpartition("/")[2]
    role = Identifier(f"installer_{name}")
    db(SQL("CREATE ROLE {} LOGIN").format(role))
    as_role = server.dsn(name, f"installer_{name}")

    def fit(*watchers: str) -> bool:
        found = examined(*watchers, dsn=as_role, cwd=tmp_path)[1]["privileges"]["level"] == "ok"
        assert (run("install", *watchers, dsn=as_role, cwd=tmp_path).code == 0) == found
        return found

    db("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    assert not fit("orders")
    db(SQL("GRANT CREATE ON SCHEMA public TO {}").format(role))
    assert not fit("orders")
    db(SQL("GRANT TRIGGER ON orders TO {}").format(role))
    assert fit("orders")
    assert not fit("--app=shop")
    db(SQL("ALTER TABLE orders OWNER TO {}").format(role))
    assert fit("--app=shop")


def test_a_table_that_is_missing_fails(dsn: str) -> None:
    """A watcher whose table is not there is told with the reason."""
    code, found = examined("order", dsn=dsn)
    assert (code, found["privileges"]["level"]) == (1, "fail")
    assert "did you mean 'orders'" in found["privileges"]["message"]


def test_a_read_only_database_fails(dsn: str, db: Database) -> None:
    """Where no trigger can be installed it says which setting is in the way."""
    name = dsn.rpartition("/")[2]
    db(SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(Identifier(name)))
    code, found = examined(dsn=dsn)
    assert (code, found["writable"]["level"]) == (1, "fail")
    assert "default_transaction_read_only" in found["writable"]["fix"]


def test_writers_that_fire_no_triggers_are_a_warning(dsn: str, db: Database) -> None:
    """A role whose session_replication_role is replica by default is named."""
    name = dsn.rpartition("/")[2]
    role = Identifier(f"loader_{name}")
    db(SQL("CREATE ROLE {}").format(role))
    db(
        SQL("ALTER ROLE {} IN DATABASE {} SET session_replication_role = replica").format(
            role, Identifier(name)
        )
    )
    code, found = examined(dsn=dsn)
    assert (code, found["replication role"]["level"]) == (0, "warn")
    assert f"role loader_{name} in database {name}" in found["replication role"]["message"]


def test_a_full_queue_names_who_holds_it(connect: Callable[[str], Database]) -> None:
    """From a tenth of the notification queue on it warns, later it fails, naming the culprit."""
    with Server(NEWEST, {"max_notify_queue_pages": "64"}) as server:
        dsn = server.dsn()
        listener, writer = connect(dsn), connect(dsn)
        listener("LISTEN somewhere")
        listener("BEGIN")
        [(pid,)] = listener("SELECT pg_backend_pid()")
        notify = "SELECT count(pg_notify('somewhere', i || repeat('x', 7000)))"
        writer(f"{notify} FROM generate_series(1, 10) i")
        code, found = examined(dsn=dsn)
        assert (code, found["queue"]["level"]) == (0, "warn")
        assert f"pid {pid}" in found["queue"]["fix"]
        writer(f"{notify} FROM generate_series(11, 55) i")
        code, found = examined(dsn=dsn)
        assert (code, found["queue"]["level"]) == (1, "fail")


class Pooler:
    """Stands for a transaction pooler: other process ids, and no notifications to idle clients."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more clients."""
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                for pump in (self._to_server, self._to_client):
                    threading.Thread(target=pump, args=(client, server), daemon=True).start()

    def _to_server(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _to_client(self, client: socket.socket, server: socket.socket) -> None:
        with server, client, server.makefile("rb") as messages, suppress(OSError):
            while head := messages.read(5):
                body = messages.read(int.from_bytes(head[1:], "big") - 4)
                if head[:1] == b"K":
                    body = bytes(4) + body[4:]
                if head[:1] != b"A":
                    client.sendall(head + body)


@pytest.fixture
def pooler(server: Server) -> Iterator[Pooler]:
    """A pooler before the server."""
    made = Pooler(server.port)
    yield made
    made.close()


# ``pgsignals doctor``, which does not wait long for what never comes.
IMPATIENT = """
from pgsignals.cli import main
from pgsignals.overview.checks import database
database.ROUND_TRIP_SECONDS = 0.5
main(prog_name="pgsignals")
"""


def test_a_transaction_pooler_is_found(dsn: str, pooler: Pooler, server: Server) -> None:
    """A notification that does not come round fails, and the fix is about the pool's mode."""
    pooled = dsn.replace(str(server.port), str(pooler.port)) + "?sslmode=disable&gssencmode=disable"
    result = Forked("-c", IMPATIENT, "doctor", "--json", dsn=pooled).end()
    found = {each["check"]: each for each in json.loads(result.out[0])["checks"]}
    assert (result.code, found["pooler"]["level"], found["round trip"]["level"]) == (
        1,
        "warn",
        "fail",
    )
    assert "pool_mode = session" in found["round trip"]["fix"]
