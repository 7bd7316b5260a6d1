"""The options of ``start``, in one place for all who give them."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from pgsignals import ConfigurationError, Hub
from pgsignals.core.transport import Transport
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
    assert {each.value: each.durable for each in Transport} == {"notify": False, "outbox": True}
    with pytest.raises(ConfigurationError, match=r"'wall': it is one of 'notify', 'outbox'\."):
        Transport("wall")
