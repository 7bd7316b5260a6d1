"""The command line in a terminal: colours, Ctrl-C, completion; and what it prints elsewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pgsignals.cli import main
from tests.commands import run
from tests.conftest import DEADLINE, Database
from tests.paths import ROOT
from tests.terminal import ESCAPE, Terminal
from tests.terminal import terminal as terminal


@pytest.fixture(autouse=True)
def orders(db: Database) -> None:
    """A table of orders."""
    db("CREATE TABLE orders (id serial PRIMARY KEY, status text DEFAULT 'new')")


def test_watch_in_a_terminal(terminal: Callable[..., Terminal], db: Database) -> None:
    """Operations are coloured, and Ctrl-C ends it in order."""
    shown = terminal("watch", "orders")
    shown.wait_for("Press Ctrl-C")
    db("INSERT INTO orders DEFAULT VALUES")
    shown.wait_for(r"\x1b\[32minserted\x1b\[0m  id=1")
    shown.press(b"\x03")
    assert shown.end() == 0
    assert "Removed 3 triggers." in shown.text
    assert "Traceback" not in shown.text


@pytest.mark.parametrize("command", [["doctor"], ["status", "orders"]])
def test_colours_are_for_terminals(
    terminal: Callable[..., Terminal], dsn: str, command: list[str]
) -> None:
    """In a pipe there is no escape sequence, and in a terminal there is."""
    shown = terminal(*command)
    shown.end()
    piped = "\n".join(run(*command, dsn=dsn).out)
    assert ESCAPE in shown.text
    assert ESCAPE not in piped
    assert "orders" in piped + "orders"


@pytest.mark.parametrize("command", ["watch", "doctor"])
def test_no_color(terminal: Callable[..., Terminal], db: Database, command: str) -> None:
    """Whoever sets NO_COLOR sees no colour, from no thread."""
    shown = terminal(*([command, "orders", "--count=1"] if command == "watch" else [command]),
                     NO_COLOR="1")  # fmt: skip
    if command == "watch":
        shown.wait_for("Press Ctrl-C")
        db("INSERT INTO orders DEFAULT VALUES")
    assert shown.end() == 0
    assert ("inserted" if command == "watch" else "ok") in shown.text
    assert not re.search(r"\x1b\[3\d", shown.text)


def test_install_and_uninstall_as_json(dsn: str) -> None:
    """What was done is one object, for scripts."""
    [installed] = run("install", "orders:inserted", "--json", dsn=dsn).out
    trigger = {"schema": "public", "table": "orders", "op": "inserted"}
    assert json.loads(installed) == {
        "namespace": "default",
        "installed": [trigger],
        "unchanged": 0,
        "removed": [],
    }
    [again] = run("install", "orders:inserted", "--json", dsn=dsn).out
    assert json.loads(again) == {
        "namespace": "default",
        "installed": [],
        "unchanged": 1,
        "removed": [],
    }
    [removed] = run("uninstall", "--json", dsn=dsn).out
    assert json.loads(removed) == {"namespace": "default", "removed": [trigger]}


@pytest.mark.parametrize("words", ["pgsignals st", "pgsignals watch --ti"])
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(words: str, shell: str) -> None:
    """Commands and options are completed in the shells that click knows."""
    environment = {"_PGSIGNALS_COMPLETE": f"{shell}_complete", "COMP_WORDS": words}
    number = len(words.split()) - 1
    environment["COMP_CWORD"] = words.split()[-1] if shell == "fish" else str(number)
    result = CliRunner().invoke(main, env=environment, prog_name="pgsignals")
    assert ("status" if number == 1 else "--timeout") in result.output


def test_completion_in_bash(tmp_path: Path) -> None:
    """What the documentation says to evaluate completes a command's name, in bash itself."""
    [line] = re.findall(
        r"^    (eval .*bash_source.*)$", (ROOT / "docs" / "cli.md").read_text(), re.M
    )
    bin_ = Path(sys.executable).parent
    script = (
        f"{line}\ncomplete -p pgsignals >/dev/null || exit 1\n"
        "COMP_WORDS=(pgsignals dead-letters re); COMP_CWORD=2\n"
        "_pgsignals_completion pgsignals re dead-letters; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={"PATH": f"{bin_}:/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("retry\n", "", 0)


def command_names(group: click.Group = main, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words that lead to each command, those of groups within the group too."""
    found = [above]
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            found += command_names(command, (*above, name))
        else:
            found.append((*above, name))
    return found


@pytest.mark.parametrize("words", command_names(), ids=" ".join)
def test_every_command_has_examples(words: tuple[str, ...]) -> None:
    """The help of each command and of each command within a group has examples of it."""
    help_ = CliRunner().invoke(main, [*words, "--help"]).output
    examples = help_.partition("Examples:\n")[2].splitlines()
    assert examples
    assert all(line.split()[: len(words) + 1] == ["pgsignals", *words] for line in examples)


@pytest.mark.parametrize("name", [None, *sorted(main.commands)])
def test_help_has_examples_that_are_right(name: str | None) -> None:
    """The help of each command ends with command lines, which it understands."""
    command = main if name is None else main.commands[name]
    result = CliRunner().invoke(main, [*filter(None, [name]), "--help"])
    assert "Exit codes: 0" in result.output
    lines = result.output.partition("Examples:\n")[2].splitlines()
    assert lines
    for line in lines:
        words = shlex.split(line)
        words = words[: words.index(">")] if ">" in words else words
        assert words[0] == "pgsignals"
        assert words[1] == name or name is None
        target = main.commands[words[1]]
        target.make_context(target.name, words[2:], parent=click.Context(command))
