"""A table to backfill, and what asks for that."""

from __future__ import annotations

import pytest

from pgsignals.consumers.backfills.requests import request
from tests.conftest import Database


@pytest.fixture(autouse=True)
def users(db: Database) -> None:
    """A table of 500 users."""
    db("CREATE TABLE users (id bigint PRIMARY KEY, name text)")
    db("INSERT INTO users SELECT n, 'user ' || n FROM generate_series(1, 500) AS n")


def rows(db: Database, count: int, first: int = 1) -> None:
    """More users."""
    db(
        "INSERT INTO users SELECT n, 'user ' || n FROM generate_series(%s, %s) AS n",
        (first, first + count - 1),
    )


def ask(db: Database, consumer: str, table: str) -> int:
    """Ask for a backfill of a table, as the command does; its id."""
    with db.connection.cursor() as cursor:
        return request(cursor, consumer, "public", table)
