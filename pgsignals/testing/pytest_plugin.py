"""The pytest plugin of pgsignals: a server, a database, the Hub under test, and its events."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pgsignals
from pgsignals.hub.hub import Hub

from .event_log import EventLog
from .server import Server


@pytest.fixture(scope="session")
def pgsignals_server() -> Iterator[Server]:
    """A running throwaway PostgreSQL, for the whole session."""
    with Server() as server:
        yield server


@pytest.fixture
def pgsignals_dsn(pgsignals_server: Server) -> str:
    """The URL of an empty database of the test's own."""
    return pgsignals_server.create_database()


@pytest.fixture
def pgsignals_hub() -> Iterator[Hub]:
    """The Hub under test: the default one, stopped at the end if it was not running before.

    Override it to test another.
    """
    hub = pgsignals.default_hub
    running = hub.running
    yield hub
    if not running:
        hub.stop()


@pytest.fixture
def events(pgsignals_hub: Hub) -> Iterator[EventLog]:
    """The events of the Hub under test, from now on, to wait for and to assert on."""
    with EventLog(pgsignals_hub) as log:
        yield log
