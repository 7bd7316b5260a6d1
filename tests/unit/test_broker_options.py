"""The options of brokers: one class each, for URLs, constructors and the documentation."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

import pgsignals
from pgsignals import ConfigurationError
from pgsignals.urls import BrokerOptions
from pgsignals_kafka import KafkaBroadcaster, KafkaSource
from pgsignals_kafka.options import Options as KafkaOptions
from pgsignals_kafka.options import SendingOptions as KafkaSendingOptions
from pgsignals_nats import NatsBroadcaster, NatsSource
from pgsignals_nats.options import Options as NatsOptions
from pgsignals_nats.options import SendingOptions as NatsSendingOptions
from tests.paths import ROOT

PAGES = ROOT / "docs"
SIDES: list[tuple[type[Any], type[BrokerOptions]]] = [
    (KafkaBroadcaster, KafkaSendingOptions),
    (KafkaSource, KafkaOptions),
    (NatsBroadcaster, NatsSendingOptions),
    (NatsSource, NatsOptions),
]
BOTH = pytest.mark.parametrize(
    ("both", "sending"),
    [(KafkaOptions, KafkaSendingOptions), (NatsOptions, NatsSendingOptions)],
)
# The text of an option that is not its default, in a URL and in Python.
OTHER: dict[type[Any], tuple[str, object]] = {
    bool: ("yes", True),
    int: ("7", 7),
    float: ("1.5", 1.5),
    str: ("other", "other"),
}
SPECIAL: dict[str, tuple[str, object]] = {
    "sasl": ("SCRAM-SHA-256", "SCRAM-SHA-256"),
    "subject": ("{prefix}.{table}.x", "{prefix}.{table}.x"),
}


def shown(default: object) -> str:
    """A default as the documentation has it."""
    if default is None:
        return ""
    text = str(default).lower() if isinstance(default, bool) else str(default)
    return f" `{text.removesuffix('.0')}`"


def rows(options: dict[str, tuple[object, str]]) -> list[str]:
    """The rows of a table of options."""
    return [f"| `{name}` |{shown(default)} | {doc} |" for name, (default, doc) in options.items()]


@BOTH
def test_the_documentation_has_them(
    both: type[BrokerOptions], sending: type[BrokerOptions]
) -> None:
    """The tables of the page on brokers are those of the classes, for both sides and for one."""
    page = (PAGES / "brokers.md").read_text()
    section = page.partition(f"\n## {both.scheme}://\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `.*$", section, re.MULTILINE)
    only = {
        name: each for name, each in sending.documented().items() if name not in both.documented()
    }
    assert found == rows(both.documented()) + rows(only)


@pytest.mark.parametrize(("side", "options"), SIDES)
def test_the_keywords_of_constructors(side: type[Any], options: type[BrokerOptions]) -> None:
    """A constructor takes each option by its name, and no other one."""
    parameters = inspect.signature(side).parameters
    assert list(parameters) == [each.name for each in fields(options)]
    assert str(side("one:1,two:2", prefix="shop")) == f"{options.scheme}://one:1,two:2/shop"
    with pytest.raises(TypeError, match="prefx"):
        side("one:1", prefx="shop")


@pytest.mark.parametrize(("side", "options"), SIDES)
def test_each_can_be_given_in_a_url(side: type[Any], options: type[BrokerOptions]) -> None:
    """Each option of a URL is read as its type, and reaches the constructor."""
    for name, (default, _) in options.documented().items():
        kind = type(default) if default is not None else str
        if name in ("max_bytes", "max_age"):
            kind = int if name == "max_bytes" else float
        text, value = SPECIAL.get(name, OTHER[kind])
        url = f"{options.scheme}://one,two:2/?{name}={text}"
        port = options.default_port
        assert options.read(url) == {
            "servers": f"one:{port},two:2",
            "user": None,
            "password": None,
            "config": {},
            name: value,
        }
        assert getattr(side.from_url(url)._options, name) == value


@BOTH
def test_what_only_the_side_that_sends_has(
    both: type[BrokerOptions], sending: type[BrokerOptions]
) -> None:
    """An option of backends= where events are read is refused, with what to do."""
    [source] = [side for side, options in SIDES if options is both]
    for name in sending.documented().keys() - both.documented().keys():
        with pytest.raises(ConfigurationError, match=rf"\?{name}=….*leave it out where they are"):
            source.from_url(f"{both.scheme}://one/?{name}=1")


@pytest.mark.parametrize(("side", "options"), SIDES)
def test_they_show_no_secrets(side: type[Any], options: type[BrokerOptions]) -> None:
    """A password, a token and a client's settings are in no text and no repr."""
    url = f"{options.scheme}://t0ken:s3cret@one/?{options.passing}name=s3cret"
    made = side.from_url(url)
    texts = [f"{each} {each!r}" for each in (made, made._options)]
    assert [text for text in texts if "s3cret" in text or "t0ken" in text] == []


def test_the_example_of_the_documentation() -> None:
    """The options of the page on plugins are read from a URL, and given as keywords."""
    page = (PAGES / "plugins.md").read_text()
    [block] = [
        block
        for block in re.findall(r"^```\{code-block\} python\n(.*?)^```$", page, re.M | re.S)
        if "BrokerOptions" in block
    ]
    names: dict[str, Any] = {"pgsignals": pgsignals}
    exec(block, names)
    make: Callable[[str], Any] = names["pgsignals_broadcaster"]
    assert make("queue://one/?durable=false")._options.durable is False
    assert make("queue://one/?durable=false")._options == names["QueueOptions"](
        "one:5672", durable=False, config={}
    )
    assert names["QueueBroadcaster"]("one:1", durable=False)._options.servers == "one:1"
    assert make("other://one/") is None
