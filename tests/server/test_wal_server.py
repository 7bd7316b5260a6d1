"""WAL delivery and the server that it needs: what is refused at start, with the way out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pgsignals
from pgsignals import ConfigurationError, DriftError, Hub, PgSignalsError
from pgsignals.testing import Server
from tests.conftest import Database, Recorder
from tests.grants import documented_grants
from tests.inside import run


@pytest.fixture(scope="module")
def unfit(each_version: int) -> Iterator[Server]:
    """A server whose log cannot be read."""
    with Server(each_version, {"wal_level": "replica", "max_slot_wal_keep_size": "-1"}) as server:
        yield server


@pytest.fixture
def orders(each_db: Database) -> None:
    """A table of orders."""
    each_db("CREATE TABLE orders (id int PRIMARY KEY)")


def test_a_log_that_cannot_be_read(unfit: Server, hub: Hub) -> None:
    """Before anything is made, start() says which setting is in the way."""
    dsn = unfit.create_database()
    with pytest.raises(ConfigurationError, match=r"wal_level 'replica': run ALTER SYSTEM SET"):
        hub.start(dsn, ["pg_catalog.pg_class"], delivery="wal")


@pytest.mark.usefixtures("orders")
def test_a_log_without_a_bound(each_dsn: str, each_db: Database, hub: Hub) -> None:
    """A named consumer could fill the server's disk: it starts where that is bounded, or wanted.

    One without a name leaves nothing behind, and needs no bound.
    """
    each_db("ALTER SYSTEM SET max_slot_wal_keep_size = -1")
    each_db("SELECT pg_reload_conf()")
    try:
        with pytest.raises(ConfigurationError) as refused:
            hub.start(each_dsn, ["orders"], delivery="wal", name="mailer")
        assert "ALTER SYSTEM SET max_slot_wal_keep_size = '10GB'" in str(refused.value)
        assert "allow_unbounded_wal=True" in str(refused.value)
        assert each_db("SELECT FROM pg_replication_slots WHERE database = current_database()") == []
        hub.start(each_dsn, ["orders"], delivery="wal")
        hub.stop()
        hub.start(each_dsn, ["orders"], delivery="wal", name="mailer", allow_unbounded_wal=True)
    finally:
        each_db("ALTER SYSTEM RESET max_slot_wal_keep_size")
        each_db("SELECT pg_reload_conf()")


@pytest.mark.usefixtures("orders")
def test_capture(each_dsn: str, each_db: Database, hub: Hub) -> None:
    """``capture`` decides for all watchers whether rows or messages serve them, or refuses."""
    [state] = (
        hub.start(each_dsn, [("orders", "inserted")], delivery="wal", capture="messages")
        .status()
        .watchers
    )
    assert (state.served, state.lacking) == ("messages", 'capture="messages" was asked for')
    assert each_db("SELECT FROM pg_publication_rel") == []
    hub.stop()
    watcher = pgsignals.watch("orders", "inserted", when="NEW.id > 1")
    with pytest.raises(pgsignals.WatcherError, match=r'capture="rows" cannot serve'):
        hub.start(each_dsn, [watcher], delivery="wal", capture="rows")
    [state] = (
        hub.start(each_dsn, [("orders", "inserted")], delivery="wal", capture="rows")
        .status()
        .watchers
    )
    assert (state.served, state.lacking) == ("rows", "")


@pytest.mark.usefixtures("orders")
def test_check_without_publications(each_dsn: str, each_db: Database, hub: Hub) -> None:
    """With install="check", publications that are missing are drift, even if none has a table."""
    given = {"delivery": "wal", "capture": "messages"}
    hub.start(each_dsn, ["orders"], **given)
    hub.stop()
    each_db("DROP PUBLICATION pgsignals, pgsignals_inserts")
    with pytest.raises(DriftError, match="pgsignals install --delivery wal"):
        hub.start(each_dsn, ["orders"], install="check", **given)


def test_two_roles(
    each_dsn: str, each_db: Database, each_server: Server, hub: Hub, recorder: Recorder
) -> None:
    """The tables' owner installs, and another role reads, with exactly the documented rights.

    Neither is a superuser; each is told what it lacks, with the statement.
    """
    name = each_dsn.rpartition("/")[2]
    owner, reader = f"owner_{name}", f"reader_{name}"
    each_db(f"CREATE ROLE {owner} LOGIN; CREATE ROLE {reader} LOGIN")
    try:
        as_owner, as_reader = (each_server.dsn(name, role) for role in (owner, reader))
        each_db("CREATE TABLE orders (id int PRIMARY KEY); GRANT CREATE ON SCHEMA public TO PUBLIC")
        install = ("install", "orders", "--delivery", "wal", "--dsn")
        refused = run(*install, as_owner)
        assert f'GRANT CREATE ON DATABASE "{name}"' in "\n".join(refused.err)
        each_db(f'GRANT CREATE ON DATABASE "{name}" TO {owner}')
        refused = run(*install, as_owner)
        assert f"The role '{owner}' does not own orders" in "\n".join(refused.err)
        each_db(f"ALTER TABLE orders OWNER TO {owner}")
        assert run(*install, as_owner).code == 0
        hub.on("orders")(recorder)
        given = {"delivery": "wal", "install": "check", "name": "mailer"}
        for grant in documented_grants("consumer"):
            each_db(f"GRANT {grant} TO {reader}")
        with pytest.raises(PgSignalsError, match=f'ALTER ROLE "{reader}" REPLICATION'):
            hub.start(as_reader, ["orders"], **given)
        each_db(f"ALTER ROLE {reader} REPLICATION")
        hub.start(as_reader, ["orders"], **given)
        each_db("INSERT INTO orders VALUES (1)")
        assert recorder.wait(1)[0].id == 1
        hub.stop()
        assert run("consumers", "drop", "mailer", "--dsn", as_reader).code == 0
        assert run("uninstall", "--dsn", as_owner).code == 0
        assert each_db("SELECT FROM pg_publication") == []
    finally:
        hub.stop()
        for role in (owner, reader):
            each_db(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")
