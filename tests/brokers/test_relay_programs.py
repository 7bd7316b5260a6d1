"""``pgsignals relay`` among programs: applications, a terminal, and the example's services."""

from __future__ import annotations

import configparser
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from confluent_kafka import KafkaException

from pgsignals import Hub
from pgsignals.cli import main
from pgsignals.cli.relay_config import RelayConfig, read_config
from pgsignals.hub.hub import Delivery
from pgsignals.plugins.loader import load_plugins
from tests.brokers import free_port
from tests.commands import Program
from tests.conftest import DEADLINE, Database
from tests.django_project import Project
from tests.inside import run
from tests.paths import ROOT
from tests.relays import KafkaBroker, NatsBroker, psql, says, terminate, write
from tests.relays import broker as broker
from tests.relays import kafka_broker as kafka_broker
from tests.relays import nats_broker as nats_broker
from tests.relays import orders as orders
from tests.relays import prefix as prefix
from tests.relays import start as start
from tests.terminal import Terminal
from tests.waiting import eventually

EXAMPLE = ROOT / "examples" / "relay"


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


def test_of_a_flask_application(
    nats_broker: NatsBroker, prefix: str, db: Database, delivery: Delivery
) -> None:
    """``flask pgsignals relay`` has the application's database, watchers and durable delivery."""
    db("CREATE TABLE items (id bigserial PRIMARY KEY, tenant integer NOT NULL DEFAULT 1)")
    result = Program(
        *("-m", "flask", "--app", "tests.flask_shop", "pgsignals", "relay", "--name", "shop"),
        *("--check", "--to", f"{nats_broker.url}?prefix={prefix}&create=true"),
        dsn=db.dsn,
        cwd=ROOT,
        SHOP_DELIVERY=delivery,
    ).end()
    assert result.code == 0, result
    assert "updated on public.items is MISSING" in "\n".join(result.out)
    assert any("wal_level" in line for line in result.out) is (delivery == "wal")


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
