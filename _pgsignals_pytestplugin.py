"""The pytest plugin of pgsignals.

It lies outside the package because pytest imports the plugins of all installed packages when it
starts: nothing of pgsignals is imported until a test asks for one of these fixtures, so that a
test run without them costs nothing, and coverage sees the imports of one with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pgsignals import Hub
    from pgsignals.testing import EventLog, Server


@pytest.fixture(scope="session")
def pgsignals_server() -> Iterator[Server]:
    """A running throwaway PostgreSQL, for the whole session."""
    from pgsignals.testing import Server

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
    import pgsignals

    hub = pgsignals.default_hub
    running = hub.running
    yield hub
    if not running:
        hub.stop()


@pytest.fixture
def events(pgsignals_hub: Hub) -> Iterator[EventLog]:
    """The events of the Hub under test, from now on, to wait for and to assert on."""
    from pgsignals.testing import EventLog

    with EventLog(pgsignals_hub) as log:
        yield log
