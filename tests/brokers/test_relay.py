"""``pgsignals relay``: from psql, by the outbox and a broker, to processes without a database."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from pgsignals.testing import Server
from tests.brokers import ODD_PASSWORD, Nats, free_port
from tests.commands import Program
from tests.conftest import DEADLINE, Database
from tests.inside import run
from tests.proxy import Proxy
from tests.relays import Broker, NatsBroker, psql, says, terminate, write
from tests.relays import broker as broker
from tests.relays import kafka_broker as kafka_broker
from tests.relays import nats_broker as nats_broker
from tests.relays import orders as orders
from tests.relays import prefix as prefix
from tests.relays import start as start
from tests.waiting import eventually

# The same columns on both sides; each side has its own receivers.
FAR = {
    "sqlalchemy": """
import decimal
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    total: Mapped[decimal.Decimal]
""",
    "django": """
import django
from django.conf import settings
settings.configure(INSTALLED_APPS=[])
django.setup()
from django.db import models

class Order(models.Model):
    status = models.TextField()
    total = models.DecimalField(max_digits=10, decimal_places=2)

    class Meta:
        app_label = "shop"
        db_table = "orders"
""",
}


RECEIVERS = {
    "sqlalchemy": """
@pgsignals.on(Order)
def everything(event):
    say(event)
""",
    "django": """
@pgsignals.on(Order, "inserted")
def inserted(event):
    say(event)

def changed(sender, event):
    assert sender is Order
    say(event)

for op in ("updated", "deleted"):
    pgsignals.signal(Order, op).connect(changed)
""",
}


FAR_MAIN = """
import os, sys
import pgsignals
from pgsignals.core.json import to_json

def say(event):
    assert event.model is Order, event.model
    os.write(1, (to_json(event.to_dict()) + "\\n").encode())

{receivers}
pgsignals.start(sys.argv[1], [pgsignals.watch(Order, extra=["status", "total"])])
os.write(1, b"started\\n")
pgsignals.run()
"""


durable = pytest.mark.parametrize("delivery", ["outbox", "wal"])


def state_of(program: Program, wanted: str) -> dict[str, Any]:
    """The first line of a relay's JSON, from here on, with a state."""
    while True:
        found: dict[str, Any] = json.loads(program.out())
        if found["state"] == wanted:
            return found


def delivers(program: Program, count: int) -> None:
    """Wait until a relay's JSON tells that so many events are delivered."""
    while json.loads(program.out())["delivered"] < count:
        pass


def test_from_psql_to_far_processes(
    broker: Broker, prefix: str, dsn: str, start: Callable[..., Program], tmp_path: Path
) -> None:
    """Two processes without a database get equal events, with their own model classes."""
    path = write(
        tmp_path,
        """
        name = "shop"
        dsn = "env:SHOP_DSN"

        [[watch]]
        table = "orders"
        extra = ["status", "total"]

        [[target]]
        url = "env:BROKER_URL"
        """,
    )
    url = f"{broker.url}?prefix={prefix}"
    relay = start(*("--config", str(path), "--json"), SHOP_DSN=dsn, BROKER_URL=f"{url}&create=true")
    state_of(relay, "active")
    far = [
        start("-c", FAR[kind] + FAR_MAIN.format(receivers=RECEIVERS[kind]), url, relay=False)
        for kind in FAR
    ]
    for each in far:
        assert each.out() == "started"
    psql(
        dsn,
        """
        INSERT INTO orders (status, total) SELECT 'new', n + 0.5 FROM generate_series(1, 3) AS n;
        BEGIN;
        UPDATE orders SET status = 'paid', total = total * 2 WHERE id = 2;
        SAVEPOINT here;
        DELETE FROM orders;
        ROLLBACK TO here;
        COMMIT;
        DELETE FROM orders WHERE id = 2;
        """,
    )
    heard = [sorted((json.loads(each.out()) for _ in range(5)), key=_place) for each in far]
    assert heard[0] == heard[1]
    assert [(event["op"], event["id"], event["values"]) for event in heard[0]] == [
        ("inserted", 1, {"status": "new", "total": "1.50"}),
        ("inserted", 2, {"status": "new", "total": "2.50"}),
        ("updated", 2, {"status": "paid", "total": "5.00"}),
        ("deleted", 2, {"status": "paid", "total": "5.00"}),
        ("inserted", 3, {"status": "new", "total": "3.50"}),
    ]
    assert heard[0][2]["old"] == {"status": "new", "total": "2.50"}
    for each in far:
        result = terminate(each)
        assert (result.code, result.out) == (0, [])
    assert terminate(relay).code == 0


def _place(event: dict[str, Any]) -> tuple[int, int]:
    """Records in order, and the events of each in theirs."""
    return event["id"], ["inserted", "updated", "deleted"].index(event["op"])


@durable
def test_a_signal_drains(
    broker: Broker, prefix: str, db: Database, start: Callable[..., Program], delivery: str
) -> None:
    """What was read is acknowledged at the end, and the next relay sends none of it again."""
    arguments = ("--watch", "orders:inserted", "--to", f"{broker.url}?prefix={prefix}&create=true")
    options = (
        "--delivery",
        delivery,
        "--name",
        "shop",
        "--json",
        "--every",
        "0.1",
        "--timeout",
        "14",
    )
    first = start(*arguments, *options)
    state_of(first, "active")
    for _ in range(10):
        db("INSERT INTO orders SELECT FROM generate_series(1, 500)")
    delivers(first, 1)
    ended = terminate(first)
    assert ended.code == 0, ended
    assert not [line for line in ended.err if "waits for the next relay" in line]
    second = start(*arguments, *options)
    [(acknowledged,)] = db("SELECT acknowledged FROM pgsignals.consumers")
    delivers(second, 5_000 - acknowledged)
    assert terminate(second).code == 0
    assert sorted(broker.ids(prefix)) == list(range(1, 5_001))
    assert db("SELECT name, acknowledged FROM pgsignals.consumers")[0][1] == 5_000


@durable
def test_a_second_relay_takes_over(
    broker: Broker, prefix: str, db: Database, start: Callable[..., Program], delivery: str
) -> None:
    """It stands by, and goes on where one that was killed had been; nothing is lost."""
    arguments = ("--watch", "orders:inserted", "--to", f"{broker.url}?prefix={prefix}&create=true")
    options = ("--delivery", delivery, "--name", "shop", "--json", "--every", "0.1")
    active = start(*arguments, *options)
    state_of(active, "active")
    standby = start(*arguments, *options)
    state_of(standby, "standing by")
    for number in range(20):
        db("INSERT INTO orders SELECT FROM generate_series(1, 500)")
        if number == 9:
            delivers(active, 1)
            active.process.kill()
    state_of(standby, "active")
    eventually(
        lambda: db("SELECT acknowledged FROM pgsignals.consumers"),
        lambda rows: rows[0][0] >= 10_000,
    )
    assert terminate(standby).code == 0
    assert set(broker.ids(prefix)) == set(range(1, 10_001))


def test_a_broker_that_is_away_at_first(
    prefix: str, db: Database, start: Callable[..., Program]
) -> None:
    """The relay says so, goes on trying, and delivers what has come meanwhile."""
    server = Nats()
    try:
        relay = start(
            *("--watch", "orders", "--name", "shop", "--json", "--every", "0.1"),
            *("--to", f"{server.url}?prefix={prefix}&create=true"),
        )
        assert "nothing listens there" in says(relay, "trying again")
        assert "nothing listens there" in state_of(relay, "trying again")["error"]
        db("INSERT INTO orders SELECT FROM generate_series(1, 100)")
        server.start()
        delivers(relay, 100)
        assert terminate(relay).code == 0
    finally:
        server.close()


def test_what_is_missing_at_the_broker(
    broker: Broker, prefix: str, db: Database, start: Callable[..., Program]
) -> None:
    """Without create=true it is named, with the fix; once it is made, the events arrive."""
    arguments = (
        *("--watch", "orders:inserted", "--name", "shop"),
        *("--to", f"{broker.url}?prefix={prefix}"),
    )
    checked = run("relay", *arguments, "--check", dsn=db.dsn)
    assert checked.code == 1
    [line] = [line for line in checked.out if line.startswith("fail")]
    assert f"{broker.missing} {prefix}" in line
    assert "create=true" in line
    relay = start(*arguments, "--json", "--every", "0.1")
    # The broker may be asked before the relay says that it has begun, or after it.
    said = [relay.err()]
    while not any("Relaying" in line for line in said):
        said.append(relay.err())
    db("INSERT INTO orders SELECT FROM generate_series(1, 10)")
    while not any(broker.missing in line for line in said):
        said.append(relay.err())
    assert any(broker.missing in line and "create=true" in line for line in said)
    broker.create(prefix)
    delivers(relay, 10)
    assert terminate(relay).code == 0
    assert sorted(broker.ids(prefix)) == list(range(1, 11))
    again = run("relay", *arguments, "--check", dsn=db.dsn)
    assert again.code == 0, again


def test_a_check_creates_nothing(broker: Broker, prefix: str, db: Database) -> None:
    """It is well where the relay would create what is missing, and leaves that to it."""
    checked = run(
        *("relay", "--watch", "orders:inserted", "--name", "shop", "--check", "--json"),
        *("--to", f"{broker.url}?prefix={prefix}&create=true"),
        dsn=db.dsn,
    )
    assert checked.code == 0
    found = json.loads(checked.out[0])
    assert found["ok"]
    levels = {each["check"]: each["level"] for each in found["checks"]}
    assert (levels["outbox"], levels["triggers"]) == ("warn", "warn")
    assert db("SELECT FROM pg_namespace WHERE nspname = 'pgsignals'") == []
    assert db("SELECT FROM pg_trigger WHERE tgname LIKE 'pgsignals%'") == []
    missing = run(
        *("relay", "--watch", "orders:inserted", "--name", "shop", "--check"),
        *("--to", f"{broker.url}?prefix={prefix}"),
        dsn=db.dsn,
    )
    assert broker.missing in "\n".join(missing.out)


def test_wrong_credentials(
    broker: Broker, prefix: str, db: Database, start: Callable[..., Program], tmp_path: Path
) -> None:
    """They are an error that says so and shows none of them; the right ones work."""
    (tmp_path / "password").write_text(f"{ODD_PASSWORD}\n")
    path = write(
        tmp_path,
        f"""
        name = "shop"
        watch = [{{table = "orders"}}]

        [[target]]
        url = "{broker.guarded}?prefix={prefix}&create=true"
        user = "env:BROKER_USER"
        password = "file:password"
        """,
    )

    def check() -> tuple[int, str]:
        result = run("relay", "--config", str(path), "--check", dsn=db.dsn, BROKER_USER="bob")
        return result.code, "\n".join(result.out + result.err)

    code, text = check()
    assert code == 0, text
    (tmp_path / "password").write_text("wr0ng-one")
    code, text = check()
    assert code == 1
    assert "the password" in text
    assert "is wrong" in text
    assert "wr0ng-one" not in text
    relay = start("--config", str(path), BROKER_USER="bob")
    assert "is wrong" in says(relay, "trying again")
    ended = terminate(relay)
    assert ended.code == 0
    assert "wr0ng-one" not in "\n".join(ended.err)


def test_tls_that_does_not_fit(broker: Broker, prefix: str, db: Database) -> None:
    """TLS to a port that has none is an error that says so."""
    result = run(
        *("relay", "--watch", "orders", "--name", "shop", "--check"),
        *("--to", f"{broker.url}?prefix={prefix}&tls=true"),
        dsn=db.dsn,
    )
    assert result.code == 1
    [line] = [line for line in result.out if line.startswith("fail")]
    assert "TLS" in line.replace("tls=true", "")


def test_a_database_that_is_away(nats_broker: NatsBroker, prefix: str) -> None:
    """It is an error at the start, and one of the checks, which goes on to the brokers."""
    dsn = f"postgresql://ann:wr0ng-one@127.0.0.1:{free_port()}/shop"
    arguments = (
        "--watch",
        "orders",
        "--name",
        "shop",
        "--to",
        f"{nats_broker.url}?prefix={prefix}",
    )
    started = run("relay", *arguments, dsn=dsn)
    assert started.code == 1
    assert "nothing listens there" in started.err[0]
    checked = run("relay", *arguments, "--check", dsn=dsn)
    assert checked.code == 1
    assert [line.split()[0] for line in checked.out] == ["fail", "fail"]
    assert "wr0ng-one" not in "\n".join(started.err + checked.out)


def test_a_database_that_goes_away(
    nats_broker: NatsBroker, prefix: str, db: Database, start: Callable[..., Program]
) -> None:
    """Once started, the relay waits for it to come back, says so, and loses nothing."""
    address, _, name = db.dsn.rpartition("/")
    host, _, port = address.rpartition(":")
    with Proxy("127.0.0.1", int(port)) as proxy:
        relay = start(
            *("--watch", "orders", "--name", "shop", "--json", "--every", "0.1"),
            *("--to", f"{nats_broker.url}?prefix={prefix}&create=true"),
            *("--dsn", f"{host}:{proxy.port}/{name}"),
        )
        state_of(relay, "active")
        proxy.refuse()
        proxy.cut()
        state_of(relay, "no database")
        db("INSERT INTO orders SELECT FROM generate_series(1, 10)")
        proxy.accept()
        delivers(relay, 10)
        assert terminate(relay).code == 0


def test_install_check(nats_broker: NatsBroker, prefix: str, db: Database) -> None:
    """Where the relay may not create triggers, missing ones are an error, with the fix."""
    arguments = (
        *("relay", "--watch", "orders", "--name", "shop", "--install", "check"),
        *("--to", f"{nats_broker.url}?prefix={prefix}&create=true"),
    )
    checked = run(*arguments, "--check", dsn=db.dsn)
    assert checked.code == 1
    failed = [line for line in checked.out if line.startswith("fail")]
    assert [line.split()[1] for line in failed] == ["outbox:", "triggers:"]
    assert all("pgsignals install --delivery outbox" in line for line in failed)
    assert run(*arguments, dsn=db.dsn).code == 1
    assert run("install", "orders", "--delivery", "outbox", dsn=db.dsn).code == 0
    assert run(*arguments, "--check", dsn=db.dsn).code == 0


def test_the_write_ahead_log(
    broker: Broker,
    prefix: str,
    db: Database,
    start: Callable[..., Program],
    tmp_path: Path,
) -> None:
    """With delivery = "wal" rows of the log reach the broker, each once, over a restart too."""
    path = write(
        tmp_path,
        f"""
        name = "shop"
        delivery = "wal"
        watch = [{{table = "orders", operations = ["inserted"]}}]

        [[target]]
        url = "{broker.url}?prefix={prefix}&create=true"
        """,
    )
    arguments = ("--config", str(path))
    consumer = f"shop/{broker.url.partition(':')[0]}"
    checked = run("relay", *arguments, "--check", "--install", "check", dsn=db.dsn)
    failed = [line for line in checked.out if line.startswith("fail")]
    assert [line.split()[1] for line in failed] == ["outbox:", "triggers:"]
    assert all("pgsignals install --delivery wal" in line for line in failed)
    checked = run("relay", *arguments, "--check", dsn=db.dsn)
    assert checked.code == 0, checked
    assert any("wal_level" in line for line in checked.out)
    port = free_port()
    relay = start(*arguments, "--json", "--every", "0.1", "--metrics-port", str(port))
    assert "Relaying" in relay.err()
    db("INSERT INTO orders SELECT FROM generate_series(1, 10)")
    delivers(relay, 10)
    assert db("SELECT FROM pg_trigger WHERE tgname LIKE 'pgsignals%'") == []

    def measured() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE) as answer:
            return str(answer.read().decode())

    known = f'pgsignals_slot_safe_bytes{{consumer="{consumer}",hub="default"}}'
    eventually(measured, lambda text: known in text)
    assert terminate(relay).code == 0
    db("INSERT INTO orders SELECT FROM generate_series(1, 5)")
    [found] = json.loads(run("consumers", "list", "--json", dsn=db.dsn).out[0])["consumers"]
    assert (found["name"], found["active"], found["unread_bytes"] > 0) == (consumer, False, True)
    relay = start(*arguments, "--json", "--every", "0.1")
    delivers(relay, 5)
    assert terminate(relay).code == 0
    assert sorted(broker.ids(prefix)) == list(range(1, 16))
    dropped = run("consumers", "drop", consumer, dsn=db.dsn)
    assert dropped.code == 0
    assert db("SELECT FROM pg_replication_slots WHERE database = current_database()") == []


def test_a_relay_without_a_bound(nats_broker: NatsBroker, prefix: str, tmp_path: Path) -> None:
    """The check fails as the relay would, unless the file allows it."""
    with Server(settings={"max_slot_wal_keep_size": "-1"}) as server:
        dsn = server.create_database()
        connection = psycopg2.connect(dsn)
        with closing(connection), connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE orders (id int PRIMARY KEY)")
        text = f"""
        name = "shop"
        delivery = "wal"
        watch = [{{table = "orders"}}]

        [[target]]
        url = "{nats_broker.url}?prefix={prefix}&create=true"
        """
        path = write(tmp_path, text)
        refused = run("relay", "--config", str(path), "--check", dsn=dsn)
        assert refused.code == 1
        [line] = [line for line in refused.out if line.startswith("fail")]
        assert "allow_unbounded_wal" in line
        path = write(tmp_path, f"allow_unbounded_wal = true\n{text}")
        assert run("relay", "--config", str(path), "--check", dsn=dsn).code == 0


def test_a_table_that_is_not_there(nats_broker: NatsBroker, prefix: str, db: Database) -> None:
    """The check names it."""
    result = run(
        *("relay", "--watch", "ordres", "--name", "shop", "--check"),
        *("--to", f"{nats_broker.url}?prefix={prefix}&create=true"),
        dsn=db.dsn,
    )
    assert result.code == 1
    assert "ordres" in next(line for line in result.out if line.startswith("fail"))


def test_lines_and_metrics(
    nats_broker: NatsBroker, prefix: str, db: Database, start: Callable[..., Program]
) -> None:
    """Without a terminal each target has a line now and then; Prometheus finds its numbers."""
    port = free_port()
    relay = start(
        *("--watch", "orders", "--name", "shop", "--metrics-port", str(port), "--every", "0.1"),
        *("--to", f"main={nats_broker.url}?prefix={prefix}&create=true"),
    )
    assert says(relay, "Relaying") == (
        "Relaying orders (inserted, updated, deleted) to main as 'shop'. Press Ctrl-C to stop."
    )
    says(relay, "main: active")
    db("INSERT INTO orders SELECT FROM generate_series(1, 7)")
    says(relay, "main: active, 7 events")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE) as answer:
        text = answer.read().decode()
    backend = f'backend="nats://127.0.0.1:{nats_broker.port}/{prefix}",hub="default"'
    assert f"pgsignals_backend_events_total{{{backend}}} 7.0" in text
    assert terminate(relay).code == 0
