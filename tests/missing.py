"""Programs that a machine may lack: their tests are skipped, or fail where CI=true."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

from pgsignals.testing import find_installations


class Missing(pytest.skip.Exception):
    """A test is skipped for what the machine lacks; one line of the summary counts all such."""


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it where CI=true, since there all of it has to run."""
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    raise Missing(what)


def program(*names: str, package: str) -> str:
    """The path of a program, by the first of its names that is there."""
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    missing(f"{names[0]} is not installed: apt-get install {package}")


def tls() -> None:
    """Ask for what a server with TLS needs."""
    program("openssl", package="openssl")
    if find_installations()[0].origin == "extra":
        missing("the only PostgreSQL is the extra's, which has no TLS: apt-get install postgresql")
