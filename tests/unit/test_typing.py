"""mypy --strict accepts small typed applications of each kind, and infers what receivers get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

TYPED = ROOT / "tests" / "typed"


def mypy(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run mypy with its own settings, not with those of this repository."""
    # mypy does not follow the import hook of an editable installation.
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    cache = str(ROOT / ".mypy_cache")
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.mark.parametrize("name", sorted(path.name for path in TYPED.glob("*.py")))
def test_applications(name: str) -> None:
    """A typed application has no error, and its misuses, which are marked, are errors."""
    done = mypy("--config-file=", name, cwd=TYPED)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_fastapi_example() -> None:
    """The example is typed throughout."""
    done = mypy("--config-file=", "main.py", cwd=ROOT / "examples" / "fastapi_live")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_django_example(tmp_path: Path) -> None:
    """The example is typed throughout, as django-stubs sees it."""
    config = tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nplugins = mypy_django_plugin.main\nexclude = migrations\n"
        "[mypy.plugins.django-stubs]\ndjango_settings_module = project.settings\n"
    )
    done = mypy("--config-file", str(config), ".", cwd=ROOT / "examples" / "django_shop")
    assert done.returncode == 0, done.stdout + done.stderr
