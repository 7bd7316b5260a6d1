"""What is released, and the workflows that check and release it, agree with what is in the tree."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests import distributions
from tests.conftest import NEWEST, OLDEST
from tests.distributions import CORE, PLUGINS, ROOT, Wrong, check_files, check_release, package

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([\w-]+):.*## ", MAKEFILE, re.MULTILINE))
WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").iterdir()
}
JOBS = {
    f"{name}:{job}": content
    for name, workflow in WORKFLOWS.items()
    for job, content in workflow["jobs"].items()
}
STEPS = [step for job in JOBS.values() for step in job.get("steps", ())]
FOLDERS = {CORE: ROOT, **{name: ROOT / package(name) for name in PLUGINS}}


def project(name: str) -> dict[str, Any]:
    """A distribution's table ``project`` in pyproject.toml."""
    content = tomllib.loads((FOLDERS[name] / "pyproject.toml").read_text())
    found: dict[str, Any] = content["project"]
    return found


def minors(name: str) -> set[str]:
    """The versions of Python that a distribution says it is for."""
    pattern = r"Programming Language :: Python :: (3\.\d+)"
    found = (re.fullmatch(pattern, each) for each in project(name)["classifiers"])
    return {match[1] for match in found if match}


def test_one_version() -> None:
    """The distributions have one version, that of the latest section of their changes."""
    [version] = {distributions.version(name) for name in FOLDERS}
    assert {distributions.changes(name)[0][0] for name in FOLDERS} == {version}
    assert f"\n| {version.rpartition('.')[0]} | yes |\n" in (ROOT / "SECURITY.md").read_text()


def test_what_is_released_together_fits_together() -> None:
    """A plugin takes the core of its minor version, and the core's extra such a plugin."""
    extras = project(CORE)["optional-dependencies"]
    requirements = [
        Requirement(each)
        for given in (*(project(name)["dependencies"] for name in PLUGINS), *extras.values())
        for each in given
    ]
    version = Version(distributions.version(CORE))
    apart = [f"{version.major}.{version.minor + by}.0" for by in (-1, 1)]
    ours = [each for each in requirements if each.name in FOLDERS and not each.extras]
    assert sorted(each.name for each in ours) == [CORE, CORE, *PLUGINS]
    for each in ours:
        assert each.specifier.contains(version), each
        assert not any(each.specifier.contains(other) for other in apart), each


@pytest.mark.parametrize("name", FOLDERS)
def test_each_says_what_it_is_for(name: str) -> None:
    """Each distribution has the licence's text, and names the versions of Python that it takes."""
    assert (FOLDERS[name] / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert minors(name) == minors(CORE)
    taken = SpecifierSet(project(name)["requires-python"])
    assert all(taken.contains(minor) for minor in minors(name))
    assert not taken.contains("3.9")


def test_workflows_cover_the_versions() -> None:
    """Each version of Python and of PostgreSQL that we say it works with is tested."""
    matrix = JOBS["ci.yml:test"]["strategy"]["matrix"]["include"]
    assert {each["python"] for each in matrix} == minors(CORE)
    [first] = re.findall(r"PostgreSQL (\d+) or newer", (ROOT / "README.md").read_text())
    assert {int(each["postgres"]) for each in matrix} == {*range(int(first), NEWEST + 1)}
    assert OLDEST in range(int(first), NEWEST)
    for job in ("check", "dist"):
        assert set(JOBS[f"ci.yml:{job}"]["strategy"]["matrix"]["python"]) <= minors(CORE)


def test_workflows_call_what_is_there() -> None:
    """Each target that a workflow or the gate makes exists, and contributors are told of each."""
    commands = [*(step.get("run", "") for step in STEPS), (ROOT / ".ci/run").read_text()]
    called = {
        name for each in commands for name in re.findall(r"^make ([\w-]+)", each, re.MULTILINE)
    }
    assert {"check", "test", "dist"} <= called <= TARGETS
    told = (ROOT / "CONTRIBUTING.md").read_text()
    assert TARGETS - {"help"} == set(re.findall(r"^\| `make ([\w-]+)` ", told, re.MULTILINE))
    [phony] = re.findall(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == TARGETS


def test_actions_are_pinned() -> None:
    """An action is named by its commit: a tag can be moved to another one."""
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used
    assert [each for each in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", each)] == []


def test_workflows_may_do_little() -> None:
    """Workflows only read, no checkout keeps its token, and each job ends; one job may publish."""
    assert {str(each["permissions"]) for each in WORKFLOWS.values()} == {"{'contents': 'read'}"}
    granted = {name: job["permissions"] for name, job in JOBS.items() if "permissions" in job}
    assert granted == {"release.yml:publish": {"id-token": "write"}}
    publish = JOBS["release.yml:publish"]
    assert publish["environment"]["name"] == "${{ matrix.distribution }}"
    assert publish["strategy"]["matrix"]["distribution"] == list(FOLDERS)
    assert [
        name for name, job in JOBS.items() if "steps" in job and "timeout-minutes" not in job
    ] == []
    checkouts = [step for step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_commits_are_checked_as_the_gate_checks() -> None:
    """The hooks for commits are the commands of `make check`, without the documentation."""
    [recipe] = re.findall(r"^check:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == [c for c in commands if "sphinx" not in c]


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    """A folder with distributions as they have to be."""
    for name in FOLDERS:
        built = f"{package(name)}-{distributions.version(name)}"
        described = (
            f"Metadata-Version: 2.4\nName: {name}\nVersion: {distributions.version(name)}\n"
            "License-Expression: MIT\nLicense-File: LICENSE\n"
            "Description-Content-Type: text/markdown\n"
        )
        files = [
            *distributions.package_files(name),
            *(f"{built}.dist-info/{each}" for each in distributions.INFO),
        ]
        with zipfile.ZipFile(tmp_path / f"{built}-py3-none-any.whl", "w") as wheel:
            for file in files:
                wheel.writestr(file, described if file.endswith("METADATA") else "")
        with tarfile.open(tmp_path / f"{built}.tar.gz", "w:gz") as sdist:
            for file in sdist_files(name):
                sdist.addfile(tarfile.TarInfo(f"{built}/{file}"))
    return tmp_path


def sdist_files(name: str) -> Iterator[str]:
    """What is needed to build it."""
    for file in distributions.package_files(name):
        yield file if name == CORE else file.partition("/")[2]
    yield from distributions.BESIDE
    if name == CORE:
        yield from ("CHANGELOG.md", "MANIFEST.in", "pgsignals.egg-info/SOURCES.txt")


def test_distributions_as_they_should_be(dist: Path) -> None:
    """Nothing is said against distributions that hold what they have to."""
    check_files(dist)


@pytest.mark.parametrize("surplus", ["tests/test_x.py", "pgsignals/left_over.py", "pgsignals/x.md"])
def test_what_does_not_belong_in_a_wheel(dist: Path, surplus: str) -> None:
    """A wheel with a file that is not the package's in the repository is refused."""
    with zipfile.ZipFile(next(dist.glob("pgsignals-*.whl")), "a") as wheel:
        wheel.writestr(surplus, "")
    with pytest.raises(Wrong, match=re.escape(surplus)):
        check_files(dist)


def test_a_wheel_that_lacks_a_file(dist: Path) -> None:
    """A wheel without py.typed, or of another version, is refused."""
    path = next(dist.glob("pgsignals_nats-*.whl"))
    with zipfile.ZipFile(path) as wheel:
        kept = {each: wheel.read(each) for each in wheel.namelist() if "py.typed" not in each}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in kept.items():
            wheel.writestr(name, content)
    with pytest.raises(Wrong, match=r"pgsignals_nats/py\.typed"):
        check_files(dist)


def test_another_version_is_no_part_of_a_release(dist: Path) -> None:
    """What a former build has left in the folder is not released."""
    (dist / "pgsignals-0.0.9.tar.gz").touch()
    with pytest.raises(Wrong, match=r"pgsignals-0\.0\.9"):
        check_files(dist)


def test_metadata_has_to_be_valid() -> None:
    """Metadata that PyPI refuses, or that says something else than the tree, are refused."""
    good = (
        f"Metadata-Version: 2.4\nName: pgsignals-nats\nVersion: {distributions.version(CORE)}\n"
        "License-Expression: MIT\nLicense-File: LICENSE\nDescription-Content-Type: text/markdown\n"
    )
    distributions.check_metadata(good.encode(), "pgsignals-nats")
    with pytest.raises(Wrong, match="requires-python"):
        distributions.check_metadata(f"{good}Requires-Python: newer\n".encode(), "pgsignals-nats")
    with pytest.raises(Wrong, match="requires pgsignals<0"):
        distributions.check_metadata(
            f"{good}Requires-Dist: pgsignals<0\n".encode(), "pgsignals-nats"
        )
    with pytest.raises(Wrong, match="None"):
        distributions.check_metadata(
            good.replace("License-Expression: MIT\n", "").encode(), "pgsignals-nats"
        )


def test_a_release_needs_its_tag_and_its_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag of another version is refused, and so are changes of another one or without a day."""
    version = distributions.version(CORE)
    latest = [(version, "2026-12-31")]
    monkeypatch.setattr(distributions, "changes", lambda name: latest)
    check_release(f"v{version}")
    with pytest.raises(Wrong, match=r"and the tag v0\.0\.9"):
        check_release("v0.0.9")
    for wrong in (version, "unreleased"), (version, ""), ("0.0.9", "2026-12-31"):
        latest[0] = wrong
        with pytest.raises(Wrong, match="have no day"):
            check_release(f"v{version}")
