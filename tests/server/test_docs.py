"""The documentation is whole: what is public is in it, and what it shows works."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

import click
import pytest

import pgsignals
import pgsignals.testing
from pgsignals import Hub
from pgsignals.cli import main
from pgsignals.contrib.flask import PgSignals
from pgsignals.plugins import hookspecs
from tests.conftest import Database, Recorder
from tests.paths import ROOT

DOCS = ROOT / "docs"
PAGES = {page.stem: page.read_text() for page in DOCS.glob("*.md")}
EVERYTHING = "\n".join(PAGES.values())


def mentioned(name: str, text: str = EVERYTHING) -> bool:
    """Whether ``name`` is in the text as a whole word."""
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def commands() -> dict[str, click.Command]:
    """The commands of ``pgsignals``, and itself by the name ``pgsignals``."""
    assert isinstance(main, click.Group)
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {"pgsignals": main, **{name: each for name, each in found.items() if each is not None}}


@pytest.mark.parametrize("name", pgsignals.__all__)
def test_public_names(name: str) -> None:
    """Every public name of the package is in the reference."""
    assert mentioned(name, PAGES["api"])


@pytest.mark.parametrize("name", pgsignals.testing.__all__)
def test_names_for_testing(name: str) -> None:
    """Every public name of pgsignals.testing is in the reference."""
    assert mentioned(name, PAGES["api"])


@pytest.mark.parametrize("kind", [pgsignals.Event, pgsignals.Gap, pgsignals.Batch])
def test_attributes(kind: type[Any]) -> None:
    """Every attribute of what receivers get is explained."""
    names = [name for name in dir(kind) if not name.startswith("_")]
    names += getattr(kind, "__dataclass_fields__", ())
    assert [name for name in names if not mentioned(name, PAGES["events"])] == []


def test_the_parameters_of_start() -> None:
    """Every parameter of ``start`` is explained, in its docstring and in a page."""
    names = set(inspect.signature(Hub.start).parameters) - {"self", "dsn", "watchers"}
    assert [name for name in names if not mentioned(name)] == []
    assert [
        name for name in names - {"delivery"} if f"``{name}" not in str(Hub.start.__doc__)
    ] == []


def test_the_settings_of_frameworks() -> None:
    """Every parameter of ``start`` is a setting of Flask's and of Django's, and named there."""
    names = {name.upper() for name in inspect.signature(Hub.start).parameters} - {"SELF"}
    assert [name for name in names if f"``PGSIGNALS_{name}``" not in str(PgSignals.__doc__)] == []
    django = PAGES["django"].partition("## Settings\n")[2].partition("\n## ")[0]
    assert [name for name in names if not mentioned(name, django)] == []


def test_the_parameters_of_watch() -> None:
    """Every option of ``watch`` has a section of its own."""
    names = list(inspect.signature(pgsignals.watch).parameters)[2:]
    assert [name for name in names if f"## `{name}`" not in PAGES["watchers"]] == []


def test_hooks() -> None:
    """Every hook has a section of its own, with an example that implements it."""
    names = [name for name in dir(hookspecs) if name.startswith("pgsignals_")]
    assert names
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGES["plugins"], re.M | re.S))
    assert [name for name in names if name not in sections] == []
    for name in names:
        blocks = re.findall(r"^```.*python\n(.*?)^```$", sections[name], re.M | re.S)
        assert f"@pgsignals.hookimpl\ndef {name}(" in "\n".join(blocks)
        for block in blocks:
            compile(block, name, "exec")


@pytest.mark.parametrize("name", commands())
def test_commands(name: str) -> None:
    """Every command and every option of it is explained."""
    assert mentioned(name, PAGES["cli"])
    options = [
        option
        for parameter in commands()[name].get_params(click.Context(main))
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    ]
    assert [option for option in options if not mentioned(option, PAGES["cli"])] == []


@pytest.mark.parametrize(
    "reason", ["reconnected", "overflow", "watcher_broken", "retention", "restored", "unknown_name"]
)
def test_reasons_of_gaps(reason: str) -> None:
    """Every reason of a Gap that its docstring names is explained."""
    assert f"``{reason}``" in str(pgsignals.Gap.__doc__)
    assert f"`{reason}`" in PAGES["guarantees"]


def test_no_other_reasons_of_gaps() -> None:
    """The reasons in the docstring are all that the core and the brokers' packages give."""
    given = {
        reason
        for package in ("pgsignals", "pgsignals_kafka", "pgsignals_nats")
        for path in (DOCS.parent / package).rglob("*.py")
        if path.parent.name != "testing"
        for reason in reasons_given(ast.parse(path.read_text()))
    }
    # What comes from a broker has the reason that it was sent with.
    given.remove("gap.reason")
    assert given == {
        "reconnected",
        "overflow",
        "watcher_broken",
        "retention",
        "restored",
        "unknown_name",
    }


def reasons_given(tree: ast.AST) -> Iterator[str]:
    """The third argument of each ``Gap(…)``: a text, or else the expression."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Gap":
            by_name = {keyword.arg: keyword.value for keyword in node.keywords}
            reason = node.args[2] if len(node.args) > 2 else by_name["reason"]
            yield reason.value if isinstance(reason, ast.Constant) else ast.unparse(reason)


def test_the_fixtures_of_the_plugin() -> None:
    """Every fixture of the pytest plugin is explained."""
    source = (DOCS.parent / "pgsignals/testing/pytest_plugin.py").read_text()
    names = re.findall(r"@pytest\.fixture.*\ndef (\w+)", source)
    assert len(names) == 4
    assert [name for name in names if f"`{name}`" not in PAGES["testing"]] == []


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile(page: str) -> None:
    """Each block of Python is Python."""
    for block in re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE):
        compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_resolver_of_the_plugins_page(
    dsn: str, db: Database, hub: Hub, recorder: Recorder
) -> None:
    """The example of a plugin watches and loads its kind of model."""
    [block] = re.findall(r"^```python\n(.*?)^```$", PAGES["plugins"], re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block, names)

    class Order:
        __table__ = "shop.orders"

        def __init__(self, id: int, customer: str) -> None:  # noqa: A002
            self.id, self.customer = id, customer

    db("CREATE SCHEMA shop")
    db("CREATE TABLE shop.orders (id serial PRIMARY KEY, customer text)")
    hub.subscribe(recorder, Order)
    hub.start(dsn, [(Order, "inserted")], resolvers=[names["pgsignals_resolver"]()])
    db("INSERT INTO shop.orders (customer) VALUES ('Ann'), ('Bob')")
    batch = pgsignals.Batch(tuple(recorder.wait(2)))
    assert [order.customer for order in batch.load(db.connection)] == ["Ann", "Bob"]
