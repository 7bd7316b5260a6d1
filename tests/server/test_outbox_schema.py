"""The schema of durable delivery notices what a dump has left out of it."""

from __future__ import annotations

import pytest

from pgsignals.outbox import schema
from tests.conftest import Database


def test_only_sequences_are_asked_for_their_values(
    each_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL is asked for the values of sequences alone, in whatever order it goes."""
    later = [f"sequence_{number}" for number in range(4)]
    monkeypatch.setattr(schema, "_SEQUENCES", (*schema._SEQUENCES, *later))
    with each_db.connection.cursor() as cursor:
        schema.install_schema(cursor)
        # Then it goes through all relations, and asks first what is cheaper to ask.
        cursor.execute("SET enable_indexscan TO off; SET enable_bitmapscan TO off")
        assert schema.left_out(cursor) == ""
        for name in ("outbox_id", "outbox_shed"):
            cursor.execute(f"DROP SEQUENCE pgsignals.{name}")
            cursor.execute(f"CREATE SEQUENCE pgsignals.{name} MINVALUE 0")
        found = schema.left_out(cursor)
        assert found == "the value of outbox_id, the value of outbox_shed"
