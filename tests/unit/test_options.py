"""The options of ``start``, in one place for all who give them."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any

import pytest

from pgsignals import ConfigurationError, Hub
from pgsignals.core.transport import Transport
from pgsignals.core.watchers import normalize
from pgsignals.hub.options import Options


def test_options_are_the_parameters_of_start() -> None:
    """They have the names and the defaults of the parameters, in their order."""
    parameters = list(inspect.signature(Hub.start).parameters.values())[1:]
    assert [each.name for each in fields(Options)] == [each.name for each in parameters]
    assert [each.default for each in fields(Options)] == [each.default for each in parameters]


def test_no_password_in_a_message() -> None:
    """What has a password in it is not shown."""
    options = Options(
        dsn="password=secret", listen_dsn="password=secret", backends=["kafka://u:secret@host"]
    )
    assert "secret" not in repr(options)


def test_each_transport() -> None:
    """A transport is what start(delivery=…) takes, and knows whether events wait."""
    assert {each.value: each.durable for each in Transport} == {
        "notify": False,
        "outbox": True,
        "wal": True,
    }
    known = r"'wall': it is one of 'notify', 'outbox', 'wal'\."
    with pytest.raises(ConfigurationError, match=known):
        Transport("wall")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"capture": "rows"}, "capture='rows' is of WAL delivery: add delivery=\"wal\""),
        ({"allow_unbounded_wal": True, "delivery": "outbox"}, "is of WAL delivery"),
        ({"capture": "row", "delivery": "wal"}, "it is one of 'rows', 'messages'"),
        ({"name": "mailer"}, 'add delivery="outbox" or delivery="wal"'),
        ({"name": "mailer", "partitions": 2, "delivery": "wal"}, "are of outbox delivery"),
    ],
)
def test_what_is_of_one_delivery_alone(given: dict[str, Any], message: str) -> None:
    """An option that means nothing in the chosen delivery is refused, with the one it is of."""
    options = Options(watchers=normalize(["orders"]), **given)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        options.check(relaying=False)
