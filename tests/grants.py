"""Roles, and the rights that docs/outbox.md gives to them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.conftest import Database
from tests.paths import ROOT


def documented_grants(role: str) -> tuple[str, ...]:
    """What docs/outbox.md has a role granted that it calls ``role``, as ``make_role`` takes it."""
    page = (ROOT / "docs/outbox.md").read_text()
    found = re.findall(rf"^GRANT ([^;]*) TO {role};", page, re.MULTILINE)
    assert found, role
    return tuple(found)


@pytest.fixture
def installer(each_dsn: str, each_db: Database) -> Iterator[str]:
    """The URL of a role that owns the database, but not its tables."""
    database = each_db.connection.info.dbname
    role = f"role_{database}"
    each_db(f"CREATE ROLE {role} LOGIN; ALTER DATABASE {database} OWNER TO {role}")
    yield each_dsn.replace("postgres@", f"{role}@")
    each_db(f"ALTER DATABASE {database} OWNER TO postgres")
    each_db(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")
