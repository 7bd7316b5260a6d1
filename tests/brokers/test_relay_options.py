"""``pgsignals relay``: what its file, its arguments and its environment say, and what counts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pgsignals import ConfigurationError, MissingExtraError
from pgsignals.cli.relay_config import RelayConfig, look_up_secret, read_config
from tests.brokers import ODD_PASSWORD, free_port
from tests.commands import Program
from tests.inside import run
from tests.relays import NatsBroker, write
from tests.relays import broker as broker
from tests.relays import kafka_broker as kafka_broker
from tests.relays import nats_broker as nats_broker
from tests.relays import orders as orders
from tests.relays import prefix as prefix


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
        ("[target]\nurl = 'nats://h/'", r"write \[\[target\]\] on a line, and url = "),
        ("watch = ['orders']", r"write \[\[watch\]\] on a line, and table = "),
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
    """An error names the package that is missing, and the extra to install."""
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
            ["--watch", "a", "--to", "nats://h/", "--name", "s", "--capture", "rows"],
            "add --delivery wal",
        ),
        (["--watch", "a", "--to", "nats://h/", "--delivery", "notify"], "'notify'"),
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
    assert "wal_level" not in both
    assert "wal_level" in relay("--delivery", "wal")
    assert "deleted on public.orders is MISSING" in both
    assert "inserted on public.orders is MISSING" in both


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
