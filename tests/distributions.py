"""Tries the distributions that `make dist` has built: ``python -m tests.distributions dist``.

Each holds its package and nothing else, and works in an environment that has nothing but it and
what it requires. With ``--tag v1.2.3``, all of them and their changes are of that version.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Collection
from pathlib import Path

from packaging.metadata import Metadata

from pgsignals.testing import find_installations
from tests.paths import ROOT

CORE = "pgsignals"
# The schemes of the URLs that each makes known.
PLUGINS = {"pgsignals-kafka": "kafka", "pgsignals-nats": "nats"}

INFO = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
BESIDE = ("LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg")

_TRY_CORE = """
import importlib.util
import os
import sys
import psycopg2
import pgsignals
from pgsignals.plugins.loader import load_plugins
from pgsignals.testing import Server

for name in ("confluent_kafka", "django", "flask", "nats", "rich", "sqlalchemy", "starlette"):
    assert importlib.util.find_spec(name) is None, name

plugins = load_plugins()
for scheme in ("kafka", "nats"):
    for find in (plugins.broadcaster, plugins.source):
        try:
            find(f"{scheme}://localhost/?prefix=shop")
        except pgsignals.MissingExtraError as error:
            assert str(error).endswith(f": pip install pgsignals-{scheme}."), error
        else:
            raise AssertionError(scheme)

os.environ["PGSIGNALS_POSTGRES_BIN"] = sys.argv[1]
with Server() as server:
    for delivery in ("notify", "outbox"):
        dsn = server.create_database()
        connection = psycopg2.connect(dsn)
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE orders (id int PRIMARY KEY)")
        with pgsignals.Hub() as hub:
            hub.start(dsn, ["orders"], delivery=delivery)
            with hub.stream("orders") as events:
                with connection, connection.cursor() as cursor:
                    cursor.execute("INSERT INTO orders VALUES (7)")
                assert next(events).id == 7
        connection.close()
"""
_TRY_PLUGIN = """
import sys
from pgsignals.plugins.loader import load_plugins

name, scheme = sys.argv[1:]
plugins = load_plugins()
[state] = plugins.states()
assert (state.name, state.distribution, state.error) == (scheme, name, ""), state
for find in (plugins.broadcaster, plugins.source):
    found = find(f"{scheme}://localhost/?prefix=shop")
    assert type(found).__module__.startswith(f"pgsignals_{scheme}."), found
"""


class Wrong(Exception):
    """A distribution is not as it has to be."""


def package(name: str) -> str:
    """The import package of a distribution; its files are named so, too."""
    return name.replace("-", "_")


def version(name: str) -> str:
    """The version of a distribution, as its package says it."""
    source = (ROOT / package(name) / "__init__.py").read_text()
    [found] = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    return str(found)


def changes(name: str) -> list[tuple[str, str]]:
    """The versions in a distribution's CHANGELOG.md, the newest first, each with its date."""
    folder = ROOT if name == CORE else ROOT / package(name)
    text = (folder / "CHANGELOG.md").read_text()
    return re.findall(r"^## \[(\d.*)\](?: - (\S+))?$", text, re.MULTILINE)


def check_release(tag: str) -> None:
    """Raise Wrong unless a tag is that of all distributions, and their changes have a day."""
    for name in (CORE, *PLUGINS):
        if tag != f"v{version(name)}":
            raise Wrong(f"{name} is version {version(name)}, and the tag {tag}")
        latest, day = changes(name)[0]
        if latest != version(name) or not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
            raise Wrong(f"the changes of {name} {version(name)} have no day: {latest} - {day}")


def check_files(dist: Path) -> None:
    """Raise Wrong unless a folder holds a wheel and an sdist of each, with what belongs in them."""
    built = {name: f"{package(name)}-{version(name)}" for name in (CORE, *PLUGINS)}
    wheels = [f"{each}-py3-none-any.whl" for each in built.values()]
    sdists = [f"{each}.tar.gz" for each in built.values()]
    compare(dist, [each.name for each in dist.iterdir()], [*wheels, *sdists])
    for name, wheel, sdist in zip(built, wheels, sdists, strict=True):
        files = package_files(name)
        info = {f"{built[name]}.dist-info/{each}" for each in INFO}
        with zipfile.ZipFile(dist / wheel) as archive:
            compare(dist / wheel, archive.namelist(), files | info)
            check_metadata(archive.read(f"{built[name]}.dist-info/METADATA"), name)
        beside = {*BESIDE, *(("CHANGELOG.md", "MANIFEST.in") if name == CORE else ())}
        # The folder of a plugin is its package.
        inside = files if name == CORE else {each.partition("/")[2] for each in files}
        with tarfile.open(dist / sdist) as archive:
            held = [each.name.partition("/")[2] for each in archive if each.isfile()]
        held = [each for each in held if f"{package(name)}.egg-info/" not in each]
        compare(dist / sdist, held, inside | beside)


def package_files(name: str) -> set[str]:
    """The files of a package that are in the repository, and so what a wheel has of it."""
    command = ["git", "-c", "safe.directory=*", "ls-files", package(name)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {file for file in listed.split() if file.endswith((".py", "/py.typed"))}


def compare(what: object, found: Collection[str], expected: Collection[str]) -> None:
    """Raise Wrong for files that are missing, and for those that do not belong there."""
    lacks, surplus = sorted({*expected} - {*found}), sorted({*found} - {*expected})
    if lacks or surplus:
        raise Wrong(f"{what}: without {lacks}, and with {surplus}")


def check_metadata(content: bytes, name: str) -> None:
    """Raise Wrong for metadata that PyPI would refuse, or that say something else than the tree."""
    try:
        metadata = Metadata.from_email(content, validate=True)
    except Exception as group:  # of a class that is not the same in each version of packaging
        raise Wrong(f"{name}: {group}: {getattr(group, 'exceptions', '')}") from group
    expected = (name, version(name), "MIT", ["LICENSE"], "text/markdown")
    found = (
        *(metadata.name, str(metadata.version), metadata.license_expression),
        *(metadata.license_files, metadata.description_content_type),
    )
    if found != expected:
        raise Wrong(f"{name} says of itself {found}, and is {expected}")
    # Another core than the one of the same release may lack what a plugin uses.
    others = [each for each in metadata.requires_dist or () if each.name in (CORE, *PLUGINS)]
    for other in others:
        if not other.extras and not other.specifier.contains(version(other.name)):
            raise Wrong(f"{name} requires {other}, and that is {version(other.name)}")


class Environment:
    """A virtual environment with what ``pip install`` is given, and nothing of this one."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        venv.create(folder, with_pip=False)
        self._folder = folder
        pip = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"))
        run(*pip, "install", "--quiet", *arguments)
        run(*pip, "check")

    def run(self, program: str, *arguments: str) -> str:
        """The output of a program of it, run away from the checkout."""
        return run(str(self._folder / "bin" / program), *arguments, cwd=self._folder)

    def python(self, code: str, *arguments: str) -> str:
        """The output of Python code."""
        return self.run("python", "-c", code, *arguments)


def run(*command: str, cwd: Path | None = None) -> str:
    """The output of a command that knows nothing of this checkout. Raises Wrong when it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_FIND_LINKS")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    if done.returncode != 0:
        raise Wrong(f"{command}: {done.stdout[-3000:]} {done.stderr[-3000:]}")
    return done.stdout


def try_all(dist: Path, folder: Path) -> None:
    """Raise Wrong unless each wheel works: the core alone, and each plugin with it."""
    wheels = {n: next(dist.glob(f"{package(n)}-*.whl")).resolve() for n in (CORE, *PLUGINS)}
    alone = Environment(folder / CORE, str(wheels[CORE]))
    told = alone.run("pgsignals", "--version")
    if told.split()[-1] != version(CORE):
        raise Wrong(f"pgsignals --version prints {told!r}")
    alone.python(_TRY_CORE, str(find_installations()[0].bindir))
    for name, scheme in PLUGINS.items():
        core = f"{CORE}[{scheme}] @ {wheels[CORE].as_uri()}"
        Environment(folder / name, core, str(wheels[name])).python(_TRY_PLUGIN, name, scheme)


def main() -> None:
    """Try all that is in a folder."""
    parser = argparse.ArgumentParser(prog="python -m tests.distributions")
    parser.add_argument("dist", type=Path)
    parser.add_argument("--tag", help="that of the release, such as v1.2.3")
    arguments = parser.parse_args()
    if arguments.tag is not None:
        check_release(arguments.tag)
    check_files(arguments.dist)
    with tempfile.TemporaryDirectory() as folder:
        try_all(arguments.dist, Path(folder))
    sys.stdout.write(f"{len([*arguments.dist.iterdir()])} files in {arguments.dist} are good\n")


if __name__ == "__main__":
    main()
