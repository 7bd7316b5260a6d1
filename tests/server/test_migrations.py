"""Statements that migrations are written with, long before they run."""

from __future__ import annotations

import pytest

from pgsignals.outbox import schema
from tests.conftest import Database


def version(db: Database) -> int:
    """That of the schema of the outbox."""
    with db.connection.cursor() as cursor:
        return schema.read_version(cursor)


def test_the_outbox_from_any_version(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One statement makes the schema, or leads on from any version, and lowers none."""
    first = schema.ensuring_statement()
    db(first)
    db(first)
    known = schema.VERSION
    assert version(db) == known

    table = "CREATE TABLE pgsignals.more (at timestamptz DEFAULT now())"
    column = "ALTER TABLE pgsignals.outbox ADD COLUMN more text"
    upgrade = schema.Upgrade(known + 1, known, (table,), (column,))
    monkeypatch.setattr(schema, "UPGRADES", (*schema.UPGRADES, upgrade))
    monkeypatch.setattr(schema, "VERSION", known + 1)
    second = schema.ensuring_statement()
    db(second)
    db(second)
    assert version(db) == known + 1
    monkeypatch.undo()
    db(first)
    assert version(db) == known + 1
    assert db("SELECT more FROM pgsignals.outbox") == []
    monkeypatch.setattr(schema, "VERSION", known + 1)
    db("DROP SCHEMA pgsignals CASCADE")
    db(second)
    assert version(db) == known + 1
    assert db("SELECT * FROM pgsignals.more") == []
