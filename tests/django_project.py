"""The example for Django, as a project of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from psycopg2.extensions import parse_dsn

from tests.commands import Program, Result
from tests.conftest import DEADLINE
from tests.forked import LIBRARY, Forked
from tests.paths import ROOT

PROJECT = ROOT / "examples" / "django_shop"

# What all commands import, whatever the project.
DJANGO = (
    "django.contrib.contenttypes.checks",
    "django.core.checks.registry",
    "django.core.management",
    "django.core.management.commands.migrate",
    "django.db.migrations.autodetector",
    "django.db.models",
    "django.forms",
    "django.template.loader",
    "django.urls",
    "django.utils.autoreload",
    "django.views.debug",
    "pgsignals.contrib.django.operations",
)


def variables(dsn: str) -> dict[str, str]:
    """A connection string as libpq's variables."""
    given = parse_dsn(dsn)
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
    return {variable: given[name] for name, variable in names.items()}


class Command(Forked):
    """A command in a process that need not import Django anew.

    What a driver decides is left out: a project says which one it has before it imports that.
    """

    modules = (*LIBRARY, *DJANGO)


class Project:
    """A copy of the example on a fresh database, run by its command line."""

    def __init__(self, path: Path, dsn: str, driver: str = "psycopg") -> None:
        shutil.copytree(PROJECT, path, ignore=shutil.ignore_patterns("__pycache__"))
        self.path = path
        if driver == "psycopg2":
            # Django prefers psycopg where it is installed.
            self.write("manage.py", "import sys\n", "import sys\n\nsys.modules['psycopg'] = None\n")
        self._variables = variables(dsn) | {"DJANGO_SETTINGS_MODULE": "project.settings"}
        self._started: list[Program] = []

    def start(self, *arguments: str, **more: str) -> Program:
        """Start a command of manage.py as a user does."""
        environment = {**self._variables, **more}
        self._started.append(Program("manage.py", *arguments, cwd=self.path, **environment))
        return self._started[-1]

    def fork(self, *arguments: str) -> Program:
        """Start a command of manage.py with Django at hand."""
        self._started.append(Command("manage.py", *arguments, cwd=self.path, **self._variables))
        return self._started[-1]

    def end(self, *arguments: str) -> Result:
        """Run a command of manage.py to its end."""
        return self.fork(*arguments).end()

    def run(self, *arguments: str) -> Result:
        """Run a command of manage.py to its end, which is a good one."""
        result = self.end(*arguments)
        assert result.code == 0, result
        return result

    def write(self, name: str, old: str, new: str) -> None:
        """Edit a file."""
        path = self.path / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def close(self) -> None:
        """End what still runs."""
        for program in self._started:
            if program.process.poll() is None:
                program.process.kill()
                program.process.wait(DEADLINE)
