"""Plugins and distributions: what a fresh environment finds, and what one that is broken stops."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pgsignals
from pgsignals.plugins.loader import load_plugins
from tests.brokers import Nats, free_port
from tests.conftest import Database, Recorder
from tests.distributions import Environment, run
from tests.paths import ROOT

# The first test builds the wheels.
pytestmark = pytest.mark.timeout(400)

EXAMPLE = Path("examples/plugin_audit")
_BUILT_BY = re.compile(r"^requires = (\[.*\])$", re.MULTILINE)


def offline(folder: Path, wheels: Path, *distributions: str) -> Environment:
    """An environment with some distributions and what they depend on, from wheels alone."""
    found = ("--no-index", "--find-links", str(wheels))
    # Most of what is installed is not run.
    return Environment(folder, "--no-compile", *found, *distributions)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of the three distributions and the example, built away from the checkout."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    built = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("pgsignals", "pgsignals_kafka", "pgsignals_nats", str(EXAMPLE)):
        shutil.copytree(ROOT / name, source / name, ignore=built)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    sources = [source, source / "pgsignals_kafka", source / "pgsignals_nats", source / EXAMPLE]
    # One environment with what they say that they are built by, in place of one for each.
    stated = {_BUILT_BY.findall((each / "pyproject.toml").read_text())[0] for each in sources}
    builder = tmp_path_factory.mktemp("builder")
    Environment(builder, "--no-compile", *{each for one in stated for each in json.loads(one)})
    run(
        *(sys.executable, "-m", "pip", "--python", str(builder / "bin" / "python"), "wheel"),
        *("--quiet", "--no-build-isolation", "--wheel-dir", str(wheels)),
        *(*map(str, sources), "pytest"),
    )
    return wheels


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Environment:
    """An environment with the core alone."""
    return offline(tmp_path_factory.mktemp("core"), wheels, "pgsignals")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Environment:
    """An environment with the core, both brokers' packages and the example."""
    return offline(
        tmp_path_factory.mktemp("whole"),
        wheels,
        "pgsignals[kafka,nats]",
        "pgsignals-audit",
        "pytest",
    )


def test_the_core_alone(core: Environment) -> None:
    """It has no client of a broker, and says which package a URL needs."""
    found = core.python(
        "import importlib.util as u; print([n for n in ('confluent_kafka', 'nats',"
        " 'pgsignals_kafka', 'pgsignals_nats', 'pytest') if u.find_spec(n)])"
    )
    assert found == "[]\n"
    assert core.run("pgsignals", "plugins") == "No plugins are installed.\n"
    sending = """
import pgsignals, sys
try:
    pgsignals.start("postgresql://", ["orders"], backends=[sys.argv[1]])
except pgsignals.MissingExtraError as error:
    print(error)
"""
    reading = """
import pgsignals, sys
try:
    pgsignals.start(sys.argv[1], ["orders"])
except pgsignals.MissingExtraError as error:
    print(error)
"""
    for code in (sending, reading):
        for kind in ("kafka", "nats"):
            text = core.python(code, f"{kind}://ann:s3cret@localhost/?prefix=shop")
            assert f"pip install pgsignals-{kind}" in text
            assert "s3cret" not in text


def test_all_of_it(whole: Environment, nats_server: Nats, prefix: str) -> None:
    """With the packages, URLs work: the servers are reached, or it is said that they are not."""
    states = json.loads(whole.run("pgsignals", "plugins", "--json"))["plugins"]
    assert [(each["distribution"], each["hooks"], each["error"]) for each in states] == [
        ("pgsignals-audit", ["pgsignals_broadcaster", "pgsignals_commands"], ""),
        ("pgsignals-kafka", ["pgsignals_broadcaster", "pgsignals_source"], ""),
        ("pgsignals-nats", ["pgsignals_broadcaster", "pgsignals_source"], ""),
    ]
    text = whole.python(
        """
import pgsignals, pgsignals_kafka.connection, sys
from pgsignals.plugins.loader import load_plugins
broadcaster = load_plugins().broadcaster(sys.argv[1])
print(broadcaster.flush(30))
broadcaster.close()
pgsignals_kafka.connection._REFUSED_SECONDS = 0.5
try:
    pgsignals.start(sys.argv[2], ["orders"])
except pgsignals.BrokerError as error:
    print(error)
""",
        f"{nats_server.url}?prefix={prefix}&create=true",
        f"kafka://127.0.0.1:{free_port()}/",
    )
    assert text.startswith("True\n")
    assert "nothing answers there" in text


def test_the_example_by_itself(whole: Environment, tmp_path: Path) -> None:
    """Its tests, the conformance suite among them, pass where it is installed."""
    tests = tmp_path / "tests"
    shutil.copytree(ROOT / EXAMPLE / "tests", tests)
    text = whole.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests))
    assert " passed" in text
    assert "failed" not in text


def test_the_example_at_work(whole: Environment, db: Database, tmp_path: Path) -> None:
    """An insert ends in the file, and its command prints it."""
    db("CREATE TABLE orders (id serial PRIMARY KEY)")
    trail = tmp_path / "audit.jsonl"
    whole.python(
        """
import pgsignals, psycopg2, sys, time
with pgsignals.start(sys.argv[1], ["orders"], delivery="outbox", name="auditor",
                     backends=["audit://" + sys.argv[2]]):
    connection = psycopg2.connect(sys.argv[1])
    with connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO orders DEFAULT VALUES")
    connection.close()
    deadline = time.monotonic() + 30
    while not pgsignals.status().backends[0].delivered:
        assert time.monotonic() < deadline
""",
        db.dsn,
        str(trail),
    )
    [line] = whole.run("pgsignals", "audit", str(trail)).splitlines()
    assert line.endswith('inserted public.orders {"id": 1}')


Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution ``acme-NAME`` 1.2 with the plugin NAME, of this code."""

    def install(name: str, code: str) -> None:
        (tmp_path / f"acme_{name}.py").write_text(code)
        info = tmp_path / f"acme_{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[pgsignals]\n{name} = acme_{name}\n")
        monkeypatch.delitem(sys.modules, f"acme_{name}", raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    return install


HOOKS = """
import pgsignals

@pgsignals.hookimpl
def pgsignals_broadcaster(url):
    raise RuntimeError("out of order at " + url)

@pgsignals.hookimpl
def pgsignals_resolver():
    raise RuntimeError("no resolver today")

@pgsignals.hookimpl
def pgsignals_commands(group):
    raise RuntimeError("no commands today")
"""


def test_a_plugin_that_cannot_be_imported(
    install: Install,
    db: Database,
    hub: pgsignals.Hub,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is named with its distribution and version, and stops only what needs it."""
    install("broken", "import a_module_that_nobody_has")
    db("CREATE TABLE orders (id serial PRIMARY KEY)")
    hub.subscribe(recorder, "orders")
    with pytest.raises(pgsignals.PluginError, match=r"broken://.*acme-broken 1\.2: ModuleNotFound"):
        hub.start(db.dsn, ["orders"], backends=["broken://ann:s3cret@there/"])
    caplog.clear()
    hub.start(db.dsn, ["orders"])
    db("INSERT INTO orders DEFAULT VALUES")
    recorder.wait(1)
    [record] = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "acme-broken 1.2" in record.getMessage()
    assert "a_module_that_nobody_has" in record.getMessage()
    states = {state.name: state for state in load_plugins().states()}
    assert "a_module_that_nobody_has" in states["broken"].error
    assert states["kafka"].error == states["nats"].error == ""


def test_a_plugin_whose_hooks_raise(
    install: Install,
    db: Database,
    hub: pgsignals.Hub,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is named, without the secrets of what it was given; nobody else's hooks are left out."""
    install("raising", HOOKS)
    db("CREATE TABLE orders (id serial PRIMARY KEY)")
    hub.subscribe(recorder, "orders")
    url = "raising://ann:s3cret@there/"
    with pytest.raises(pgsignals.PluginError, match=r"acme-raising 1\.2: RuntimeError") as caught:
        hub.start(db.dsn, ["orders"], backends=[url])
    assert "s3cret" not in str(caught.value)
    with pytest.raises(pgsignals.ConfigurationError) as told:
        hub.start(db.dsn, ["orders"], backends="nats://s3cret@there/")
    assert "s3cret" not in str(told.value)
    monkeypatch.setattr("pgsignals_kafka.connection._REFUSED_SECONDS", 0.5)
    with pytest.raises(pgsignals.BrokerError, match="nothing answers there"):
        hub.start(f"kafka://ann:s3cret@127.0.0.1:{free_port()}/", ["orders"])
    hub.start(
        db.dsn, ["orders"], backends=[f"nats://ann:s3cret@127.0.0.1:{free_port()}/?prefix=shop"]
    )
    db("INSERT INTO orders DEFAULT VALUES")
    recorder.wait(1)
    assert "acme-raising 1.2" in caplog.text
    assert "no resolver today" in caplog.text
    assert "s3cret" not in caplog.text
    hub.stop(0.5)


def test_the_command_line_with_broken_plugins(install: Install, tmp_path: Path) -> None:
    """The other commands are there, and ``plugins`` says what is wrong, by its exit code too."""
    install("raising", HOOKS)
    install("broken", "import a_module_that_nobody_has")

    def pgsignals_command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pgsignals", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )

    done = pgsignals_command("--help")
    assert done.returncode == 0
    assert "status" in done.stdout
    assert "acme-raising 1.2: RuntimeError in pgsignals_commands: no commands today" in done.stderr
    done = pgsignals_command("plugins", "--json")
    assert done.returncode == 1
    states = {each["name"]: each for each in json.loads(done.stdout)["plugins"]}
    assert (states["broken"]["distribution"], states["broken"]["version"]) == ("acme-broken", "1.2")
    assert "a_module_that_nobody_has" in states["broken"]["error"]
    assert states["raising"]["error"] == states["kafka"]["error"] == ""
