"""The tests' own ground: what a machine lacks, and what a test leaves behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import NEWEST, OLDEST
from tests.paths import ROOT

pytest_plugins = "pytester"


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project whose tests stand on the same ground."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("CI", raising=False)
    return pytester


def run(pytester: pytest.Pytester) -> pytest.RunResult:
    """Run the project's tests in a process of their own, in their order."""
    return pytester.runpytest_subprocess(
        *("-p", "no:cacheprovider", "-p", "no:randomly", "-p", "tests.conftest", "-ra")
    )


@pytest.fixture
def lacking(inner: pytest.Pytester) -> pytest.Pytester:
    """A project that needs a program which no machine has, in three places."""
    inner.makepyfile(
        """
        import pytest
        from tests.missing import program

        @pytest.fixture(scope="session")
        def server():
            program("no-such-program", package="nothing")

        def test_one(server):
            pass

        def test_two(server):
            pass

        def test_three():
            program("no-such-program", "nor-this-one", package="nothing")

        def test_four():
            assert program("no-such-program", "sh", package="dash").endswith("/sh")
        """
    )
    return inner


def test_a_missing_program_takes_one_line(lacking: pytest.Pytester) -> None:
    """All that one program skips is one line of the summary, which says how to get it."""
    result = run(lacking)
    result.assert_outcomes(passed=1, skipped=3)
    [line] = [line for line in result.outlines if "no-such-program" in line]
    assert line.startswith("SKIPPED [3] ")
    assert line.endswith(": no-such-program is not installed: apt-get install nothing")


def test_a_missing_program_fails_where_all_has_to_run(
    lacking: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CI=true nothing is skipped for want of a program."""
    monkeypatch.setenv("CI", "true")
    run(lacking).assert_outcomes(passed=1, errors=2, failed=1)


def test_one_version_of_postgresql(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, each_version: int
) -> None:
    """With PGSIGNALS_TEST_POSTGRES all tests run on that version, and so does what they start."""
    monkeypatch.setenv("PGSIGNALS_TEST_POSTGRES", str(each_version))
    inner.makepyfile(
        f"""
        import os
        from pgsignals.testing import Server

        def test_version(each_version):
            assert each_version == Server().version == {each_version}
            assert os.environ["PGSIGNALS_POSTGRES_BIN"] == str(Server().installation.bindir)
        """
    )
    run(inner).assert_outcomes(passed=1)


def test_a_thread_that_stays_fails_its_test(inner: pytest.Pytester) -> None:
    """A test is an error whose thread has not ended; one that ends late is waited for."""
    inner.makepyfile(
        """
        import threading
        import tests.conftest

        let_go = threading.Event()

        class Late(threading.Thread):
            def join(self, timeout=None):
                let_go.set()
                super().join(timeout)

        def test_late():
            Late(target=let_go.wait, name="pgsignals-late", daemon=True).start()

        def test_none():
            assert not tests.conftest._threads()

        def test_staying():
            tests.conftest.DEADLINE = 0.1
            stay = threading.Event().wait
            threading.Thread(target=stay, name="pgsignals-staying", daemon=True).start()

        def test_the_next_one():
            assert len(tests.conftest._threads()) == 1
        """
    )
    result = run(inner)
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(["E *pgsignals-staying runs on behind the test*"])


def test_two_turns_are_the_whole_matrix() -> None:
    """What one turn leaves out is in the next, and each has every test on one version."""

    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/server/test_values.py"]
    around = {k: v for k, v in os.environ.items() if k != "PGSIGNALS_TEST_POSTGRES"}

    def collected(*options: str) -> list[str]:
        done = subprocess.run(
            [*asked, *options], capture_output=True, text=True, cwd=ROOT, env=around, check=False
        )
        assert done.returncode == 0, done.stdout
        return [line for line in done.stdout.splitlines() if "::" in line]

    whole, odd, even = collected(), collected("--turn=7"), collected("--turn=8")
    assert sorted([*odd, *even]) == sorted(whole)
    names = [[re.sub(r"pg\d+", "", each) for each in turn] for turn in (odd, even)]
    assert sorted(names[0]) == sorted(names[1]) == sorted({*names[0]})
    assert all(any(f"pg{version}" in each for each in odd) for version in (OLDEST, NEWEST))
