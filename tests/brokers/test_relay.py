"""``pgsignals relay``: from psql, by the outbox and a broker, to processes without a database."""

from __future__ import annotations

import asyncio
import configparser
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nats
import pytest
import yaml
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from pgsignals import ConfigurationError, Hub, MissingExtraError
from pgsignals.cli import main
from pgsignals.cli.relay_config import RelayConfig, look_up_secret, read_config
from pgsignals.plugins.loader import load_plugins
from pgsignals.testing import find_installations
from tests.brokers import ODD_PASSWORD, Kafka, Nats, free_port
from tests.commands import Program, Result
from tests.conftest import DEADLINE, Database
from tests.django_project import Project
from tests.inside import run
from tests.paths import ROOT
from tests.proxy import Proxy
from tests.terminal import Terminal
from tests.waiting import eventually

EXAMPLE = ROOT / "examples" / "relay"

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


def psql(dsn: str, script: str) -> None:
    """Have psql run a script."""
    beside = (found.bindir / "psql" for found in find_installations())
    program = next(path for path in beside if path.exists())
    subprocess.run(
        [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", "-"],
        input=script.encode(),
        check=True,
    )


class KafkaBroker:
    """Apache Kafka, as the tests below use a broker; with a port that asks for a password."""

    def __init__(self, server: Kafka) -> None:
        self.port = server.port
        self.guarded = f"kafka://127.0.0.1:{server.sasl_port}/"
        self.url = server.url
        self.missing = "there is no topic"

    def ids(self, prefix: str) -> list[int]:
        """The ids of all records of the table orders, by confluent-kafka alone."""
        consumer = Consumer({"bootstrap.servers": f"127.0.0.1:{self.port}", "group.id": "foreign"})
        try:
            topic = f"{prefix}.public.orders"
            places = [
                TopicPartition(topic, number, OFFSET_BEGINNING)
                for number in consumer.list_topics(topic, timeout=DEADLINE).topics[topic].partitions
            ]
            ends = [consumer.get_watermark_offsets(place, timeout=DEADLINE)[1] for place in places]
            consumer.assign(places)
            found: list[int] = []
            while len(found) < sum(ends):
                arrived = consumer.consume(sum(ends) - len(found), timeout=DEADLINE)
                assert arrived, f"{len(found)} of {sum(ends)}"
                found += [json.loads(each.value())["key"]["id"] for each in arrived]
            return found
        finally:
            consumer.close()

    def create(self, prefix: str) -> None:
        """Create what the events of orders need."""
        admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{self.port}"})
        for answer in admin.create_topics([NewTopic(f"{prefix}.public.orders", 2, 1)]).values():
            answer.result(DEADLINE)


class NatsBroker:
    """A nats-server, as the tests below use a broker; another one asks for a password."""

    def __init__(self) -> None:
        self.server = Nats()
        self.server.start()
        self._guarded = Nats(f'authorization {{ user: bob, password: "{ODD_PASSWORD}" }}\n')
        self._guarded.start()
        self.port = self.server.port
        self.guarded = self._guarded.url
        self.url = self.server.url
        self.missing = "there is no stream"

    def ids(self, prefix: str) -> list[int]:
        """The ids of all messages of the table orders, by nats-py alone."""

        async def read() -> list[int]:
            client = await nats.connect(self.url)
            jetstream = client.jetstream()
            count = (await jetstream.stream_info(prefix)).state.messages
            subscription = await jetstream.subscribe(f"{prefix}.>", ordered_consumer=True)
            found = []
            while len(found) < count:
                message = await subscription.next_msg(DEADLINE)
                found.append(json.loads(message.data)["key"]["id"])
            await client.close()
            return found

        return asyncio.run(read())

    def create(self, prefix: str) -> None:
        """Create what the events of orders need."""

        async def create() -> None:
            client = await nats.connect(self.url)
            await client.jetstream().add_stream(name=prefix, subjects=[f"{prefix}.>"])
            await client.close()

        asyncio.run(create())

    def close(self) -> None:
        """End both."""
        self.server.close()
        self._guarded.close()


Broker = KafkaBroker | NatsBroker


@pytest.fixture
def kafka_broker(kafka: Kafka) -> KafkaBroker:
    """A running Apache Kafka."""
    return KafkaBroker(kafka)


@pytest.fixture(scope="module")
def nats_broker() -> Iterator[NatsBroker]:
    """A running nats-server."""
    running = NatsBroker()
    yield running
    running.close()


@pytest.fixture(params=["kafka", "nats"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Each kind of broker."""
    found: Broker = request.getfixturevalue(f"{request.param}_broker")
    return found


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test uses."""
    return f"t{uuid.uuid4().hex[:8]}"


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders."""
    db("CREATE TABLE orders (id bigserial PRIMARY KEY, status text, total numeric(10, 2))")


@pytest.fixture
def start(dsn: str) -> Iterator[Callable[..., Program]]:
    """Starts relays, or other programs, that are ended at the end."""
    started: list[Program] = []

    def start(*arguments: str, relay: bool = True, **variables: str) -> Program:
        command = ("-m", "pgsignals", "relay", *arguments) if relay else arguments
        started.append(Program(*command, dsn=dsn if relay else "", **variables))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait(DEADLINE)


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


def says(program: Program, wanted: str) -> str:
    """The first line of its stderr, from here on, with a text in it."""
    while True:
        line = program.err()
        if wanted in line:
            return line


def terminate(program: Program) -> Result:
    """Send SIGTERM and wait for the end."""
    program.process.terminate()
    return program.end()


def write(folder: Path, text: str) -> Path:
    """A file of TOML."""
    path = folder / "pgsignals.toml"
    path.write_text(text)
    return path


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


def test_a_signal_drains(
    broker: Broker, prefix: str, db: Database, start: Callable[..., Program]
) -> None:
    """What was read is acknowledged at the end, and the next relay sends none of it again."""
    arguments = ("--watch", "orders:inserted", "--to", f"{broker.url}?prefix={prefix}&create=true")
    options = ("--name", "shop", "--json", "--every", "0.1", "--timeout", "14")
    first = start(*arguments, *options)
    state_of(first, "active")
    for _ in range(10):
        db("INSERT INTO orders SELECT FROM generate_series(1, 500)")
    delivers(first, 1)
    ended = terminate(first)
    assert ended.code == 0, ended
    assert not [line for line in ended.err if "waits in the outbox" in line]
    second = start(*arguments, *options)
    [(acknowledged,)] = db("SELECT acknowledged FROM pgsignals.consumers")
    delivers(second, 5_000 - acknowledged)
    assert terminate(second).code == 0
    assert sorted(broker.ids(prefix)) == list(range(1, 5_001))
    assert db("SELECT name, acknowledged FROM pgsignals.consumers")[0][1] == 5_000


def test_a_second_relay_takes_over(
    broker: Broker, prefix: str, db: Database, start: Callable[..., Program]
) -> None:
    """It stands by, and goes on where one that was killed had been; nothing is lost."""
    arguments = ("--watch", "orders:inserted", "--to", f"{broker.url}?prefix={prefix}&create=true")
    options = ("--name", "shop", "--json", "--every", "0.1")
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
    assert "Relaying" in relay.err()
    db("INSERT INTO orders SELECT FROM generate_series(1, 10)")
    assert "create=true" in says(relay, broker.missing)
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = 1", r"name: Expected `str \| null`, got `int`"),
        ("nmae = 'shop'", r"no key nmae \(did you mean 'name'\?\)"),
        (
            "[[watch]]\ntable = 'a'\ncolums = ['b']",
            r"no key watch\[0\]\.colums \(did you mean 'col",
        ),
        ("[[watch]]\nextra = ['b']", r"watch\[0\]: Object missing required field `table`"),
        ("[[watch]]\ntable = 'a'\noperations = ['insert']", r"watch\[0\]: .*'inserted'"),
        ("[[target]]\nurl = 'nats://h/'\nto = 'b'", r"no key target\[0\]\.to\b"),
        ("[[target]]\nurl = 'localhost:9092'", r"target\[0\]: A target is not a URL"),
        ("[[target]]\nurl = 'nats://h/'\npassword = 's3cret'", r"write 'env:VARIABLE'"),
        ("[[target]]\nurl = 'nats://h/'\npassword = 'env:S'", r"no variable S\."),
        ("[[target]]\nurl = 'nats://a:s3cret@h/'\nuser = 'b'", r"then none in the url"),
        ("dsn = 'env:NOT_THERE'", r"dsn: 'env:NOT_THERE': the environment has no variable"),
        ("dsn = 'file:none'", r"dsn: 'file:none': .*none cannot be read: No such file"),
        ("dsn = 'credential:dsn'", r"no CREDENTIALS_DIRECTORY"),
        ("install = 'yes'", r"install: Invalid enum value 'yes'"),
        ("name = s3cret", r"is not TOML: .*line 1"),
    ],
)
def test_a_wrong_file(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, with the file, the key, and what is nearest or allowed, and no secret."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError, match=says) as caught:
        read_config(path, RelayConfig())
    assert str(caught.value).startswith(str(path))
    assert "s3cret" not in str(caught.value)


def test_without_a_parser_of_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, with the extra to install."""
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pgsignals\[cli\]'"):
        read_config(write(tmp_path, ""), RelayConfig())


def test_a_file_says_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key becomes what it stands for; secrets come from where the file says."""
    monkeypatch.setenv("NATS_URL", "nats://h1:4222,h2:4222/?prefix=shop")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "dsn").write_text("service=shop\n")
    path = write(
        tmp_path,
        """
        name = "shop"
        dsn = "credential:dsn"
        listen_dsn = "host=direct"
        namespace = "relays"
        install = "check"
        prune = true
        lease = 10
        queue_size = 500
        metrics_port = 9187
        app = "shop.signals:WATCHERS"

        [[watch]]
        table = "orders"
        operations = ["updated"]
        columns = ["status"]
        when = "NEW.status = 'paid'"
        extra = ["total"]
        label = "paid"
        replicated = true

        [[target]]
        name = "main"
        url = "env:NATS_URL"
        user = "ann"
        password = "env:PASSWORD"

        [[target]]
        url = "kafka://localhost:9092/?prefix=shop"
        """,
    )
    monkeypatch.setenv("PASSWORD", ODD_PASSWORD)
    found = read_config(path, RelayConfig())
    assert (found.name, found.dsn, found.listen_dsn) == ("shop", "service=shop", "host=direct")
    assert (found.namespace, found.install, found.prune) == ("relays", "check", True)
    assert (found.lease, found.queue_size, found.metrics_port) == (10.0, 500, "9187")
    assert found.app == "shop.signals:WATCHERS"
    [watcher] = found.watchers
    assert (watcher.model, watcher.ops, watcher.columns) == ("orders", ("updated",), ("status",))
    assert (watcher.extra, watcher.label, watcher.replicated) == (("total",), "paid", True)
    main, kafka = found.targets
    assert main.url == "nats://ann:s3cret%2Fof%3Abob%40@h1:4222,h2:4222/?prefix=shop"
    assert (main.name, kafka.name) == ("main", "kafka")
    assert "s3cret" not in repr(found)
    assert look_up_secret("postgresql://localhost/shop") == "postgresql://localhost/shop"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "nats://h/", "--name", "shop"], "Give what to watch"),
        (["--watch", "orders", "--name", "shop"], "Give where events go"),
        (["--watch", "orders", "--to", "nats://h/"], "Give the relay a name"),
        (["--watch", "orders", "--to", "h:4222", "--name", "shop"], "is not a URL"),
        (
            ["--watch", "orders", "--to", "amqp://a:s3cret@h/", "--name", "shop"],
            "The target 'amqp' has",
        ),
        (
            ["--watch", "orders", "--to", "nats://h/?prefx=a", "--name", "s"],
            "did you mean 'prefix'",
        ),
        (["--watch", "orders:insert", "--to", "nats://h/"], "'inserted'"),
        (
            ["--watch", "a", "--to", "nats://h/", "--to", "nats://i/", "--name", "s"],
            "Two targets are called 'nats'",
        ),
        (["--config", "none.toml"], "none.toml cannot be read"),
        (
            ["--watch", "a", "--to", "nats://h/", "--name", "s", "--metrics-port", "x"],
            "write PORT or HOST:PORT",
        ),
    ],
)
def test_a_wrong_command_line(arguments: Sequence[str], says: str, dsn: str) -> None:
    """It ends with exit code 2 before anything is connected to, and shows no secret."""
    result = run("relay", *arguments, dsn=dsn)
    assert result.code == 2
    assert says in "\n".join(result.err)
    assert "s3cret" not in "\n".join(result.err)


def test_what_counts_where_both_say_something(
    nats_broker: NatsBroker,
    prefix: str,
    dsn: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Options go before the file, and the file before the environment; its targets are added to."""
    write(
        tmp_path,
        f"""
        name = "of-the-file"
        dsn = "{dsn}"
        namespace = "of-the-file"
        watch = [{{table = "orders", operations = ["inserted"]}}]
        target = [{{url = "{nats_broker.url}?prefix={prefix}&create=true"}}]
        """,
    )
    nowhere = f"postgresql://127.0.0.1:{free_port()}/shop"

    monkeypatch.chdir(tmp_path)

    def relay(*arguments: str) -> str:
        return "\n".join(run("relay", *arguments, "--check", dsn=nowhere).out)

    assert "ok    connection" in relay()
    assert "fail  connection" in relay("--dsn", nowhere)
    other = f"other={nats_broker.url}?prefix={prefix}"
    both = relay("--config", "pgsignals.toml", "--to", other, "--watch", "orders:deleted")
    assert "ok    target nats" in both
    assert "fail  target other" in both
    assert "deleted on public.orders is MISSING" in both
    assert "inserted on public.orders is MISSING" in both


def test_beside_an_application(
    nats_broker: NatsBroker,
    prefix: str,
    db: Database,
    hub: Hub,
    start: Callable[..., Program],
) -> None:
    """The triggers of an application of the same namespace stay, though nobody listens now."""
    hub.start(db.dsn, ["orders"])
    hub.stop()
    relay = start(
        *("--watch", "orders", "--name", "shop"),
        *("--to", f"{nats_broker.url}?prefix={prefix}&create=true"),
    )
    says(relay, "nats: active")
    hub.start(db.dsn, ["orders"], install="check")
    with hub.stream("orders") as events:
        db("INSERT INTO orders DEFAULT VALUES")
        event = events.get(DEADLINE)
    assert event is not None
    assert event.id == 1
    eventually(lambda: nats_broker.ids(prefix), lambda ids: ids == [1])


def test_of_a_flask_application(nats_broker: NatsBroker, prefix: str, db: Database) -> None:
    """``flask pgsignals relay`` has the application's database and watchers."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, tenant integer NOT NULL DEFAULT 1)")
    result = Program(
        *("-m", "flask", "--app", "tests.flask_shop", "pgsignals", "relay", "--name", "shop"),
        *("--check", "--to", f"{nats_broker.url}?prefix={prefix}&create=true"),
        dsn=db.dsn,
        cwd=ROOT,
    ).end()
    assert result.code == 0, result
    assert "updated on public.items is MISSING" in "\n".join(result.out)


def test_interrupted(nats_broker: NatsBroker, prefix: str, start: Callable[..., Program]) -> None:
    """Ctrl-C ends it as SIGTERM does."""
    relay = start(
        *("--watch", "orders", "--name", "shop"),
        *("--to", f"{nats_broker.url}?prefix={prefix}&create=true"),
    )
    says(relay, "nats: active")
    relay.process.send_signal(signal.SIGINT)
    ended = relay.end()
    assert (ended.code, ended.err) == (0, ["Ending: brokers acknowledge what was read."])


def test_without_the_extra_of_metrics(dsn: str) -> None:
    """What is missing is named, with the package to install."""
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from pgsignals.cli import main; main(prog_name='pgsignals')"
    )
    result = Program(
        *("-c", code, "relay", "--watch", "orders", "--to", "nats://127.0.0.1:1/", "--name", "s"),
        *("--metrics-port", "1"),
        dsn=dsn,
    ).end()
    assert result.code == 1
    assert "pip install 'pgsignals[metrics]'" in result.err[-1]


def test_on_a_terminal(nats_broker: NatsBroker, prefix: str, dsn: str, db: Database) -> None:
    """Each target has a line that is drawn again in its place, below whatever is printed."""
    shown = Terminal(
        *("relay", "--watch", "orders", "--name", "shop"),
        *("--to", f"main={nats_broker.url}?prefix={prefix}&create=true"),
        *("--to", f"away=nats://127.0.0.1:{free_port()}/?prefix={prefix}"),
        dsn=dsn,
    )
    try:
        shown.wait_for(r"main  \x1b\[32mactive\x1b\[0m +0 events  0/s  lag 0\.0 s\r\n")
        shown.wait_for(r"away  \x1b\[31mtrying again\x1b\[0m  0 waiting, lag 0\.0 s  not conn")
        db("INSERT INTO orders SELECT FROM generate_series(1, 1234)")
        shown.wait_for(r"\x1b\[2F\x1b\[Jmain  \x1b\[32mactive\x1b\[0m +1,234 events")
        shown.press(b"\x03")
        shown.wait_for("Ending")
        shown.press(b"\x03")
        assert shown.end() != 0
        assert "Traceback" not in shown.text
    finally:
        shown.close()


def relayed(broker: KafkaBroker, prefix: str) -> list[int]:
    """The ids that have arrived, none while the topic is being made."""
    try:
        return broker.ids(prefix)
    except KafkaException:
        return []


def test_the_example(
    kafka_broker: KafkaBroker,
    nats_broker: NatsBroker,
    prefix: str,
    db: Database,
    start: Callable[..., Program],
) -> None:
    """Its file passes events on to both brokers, where its README's program reads them."""
    db("DROP TABLE orders")
    db((EXAMPLE.parent / "schema.sql").read_text())
    variables = {
        "DATABASE_URL": db.dsn,
        "KAFKA_URL": f"{kafka_broker.url}?prefix={prefix}&create=true",
        "NATS_URL": f"{nats_broker.url}?prefix={prefix}&create=true",
    }
    path = str(EXAMPLE / "pgsignals.toml")
    checked = run("relay", "--config", path, "--check", dsn=db.dsn, **variables)
    assert checked.code == 0, checked
    relay = start("--config", path, **variables)
    says(relay, "nats: active")
    readme = (EXAMPLE / "README.md").read_text()
    [program] = re.findall(r"python -c '\n(.*?)'\n", readme, re.DOTALL)
    url = f"{nats_broker.url}?prefix={prefix}"
    assert "nats://localhost:4222/?prefix=shop" in program
    program = program.replace("nats://localhost:4222/?prefix=shop", url)
    connected = "pgsignals.connected.connect(lambda hub: print('reading', flush=True), weak=False)"
    far = start(
        "-c", program.replace("import pgsignals", f"import pgsignals; {connected}"), relay=False
    )
    assert far.out() == "reading"
    [change] = re.findall(r"^psql \"\$DATABASE_URL\" -c \"(.*)\"$", readme, re.MULTILINE)
    psql(db.dsn, change)
    assert far.out() == "inserted 1 {'customer': 'Ann', 'status': 'new', 'total': Decimal('12.50')}"
    # Each broker gets them by itself: what one has, the other may have yet to get.
    eventually(lambda: relayed(kafka_broker, prefix), lambda ids: ids == [1])
    assert terminate(relay).code == 0


def test_the_compose_file_of_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """It mounts what is there, waits for what there is, and sets what the file asks for."""
    services = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())["services"]
    assert set(services) == {"postgres", "kafka", "nats", "relay"}
    relay = services["relay"]
    assert set(relay["depends_on"]) <= set(services)
    assert "healthcheck" in services["postgres"]
    for service in services.values():
        for volume in service.get("volumes", []):
            assert (EXAMPLE / volume.split(":")[0]).is_file()
    assert (EXAMPLE / relay["build"]["context"] / relay["build"]["dockerfile"]).is_file()
    for name, value in relay["environment"].items():
        monkeypatch.setenv(name, value)
    config = read_config(EXAMPLE / "pgsignals.toml", RelayConfig())
    hosts = {config.dsn, *(target.url for target in config.targets)}
    assert {urlsplit(str(url)).hostname for url in hosts} == {"postgres", "kafka", "nats"}
    for target in config.targets:
        load_plugins().broadcaster(target.url)
    for name in re.findall(r"^COPY (.*) \S+$", (EXAMPLE / "Dockerfile").read_text(), re.MULTILINE):
        assert all((ROOT / each).exists() for each in name.split())


def test_the_unit_of_the_example(tmp_path: Path) -> None:
    """systemd takes it, and waits longer than a relay needs to end."""
    text = (EXAMPLE / "pgsignals-relay.service").read_text()
    unit = configparser.RawConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    service = unit["Service"]
    _, *arguments = service["ExecStart"].split()
    assert arguments[0] in main.commands
    context = main.commands["relay"].make_context("relay", arguments[1:])
    assert int(service["TimeoutStopSec"]) > context.params["timeout"]
    assert (service["DynamicUser"], service["Restart"]) == ("yes", "always")
    if (tool := shutil.which("systemd-analyze")) is not None:
        copy = tmp_path / "pgsignals-relay.service"
        copy.write_text(text.replace("/opt/pgsignals/bin/pgsignals", sys.executable))
        done = subprocess.run([tool, "verify", copy], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_of_a_django_project(
    nats_broker: NatsBroker, prefix: str, dsn: str, db: Database, tmp_path: Path
) -> None:
    """``manage.py pgsignals relay`` has the project's database, watchers and INSTALL."""
    db("DROP TABLE orders")
    project = Project(tmp_path / "shop", dsn)
    project.run("migrate")
    arguments = ("pgsignals", "relay", "--name", "shop", "--check")
    target = ("--to", f"{nats_broker.url}?prefix={prefix}&create=true")
    checked = project.start(*arguments, *target).end()
    assert checked.code == 1
    failed = [line for line in checked.out if line.startswith("fail")]
    assert [line.split()[1] for line in failed] == ["outbox:", "triggers:"]
    assert "updated on public.shop_order is OUTDATED" in failed[1]
    path = write(
        tmp_path,
        f"""
        name = "shop"
        install = "auto"
        target = [{{url = "{nats_broker.url}?prefix={prefix}&create=true"}}]
        """,
    )
    project.run("pgsignals", "relay", "--config", str(path), "--check")
