"""Replication slots are made, looked at, freed and dropped by SQL that all versions take."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from contextlib import closing

import psycopg2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extras import LogicalReplicationConnection

from pgsignals.wal.slots import create, drop, end_holder, look, slot_name
from tests.conftest import Database
from tests.waiting import eventually

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=80)


@given(NAMES, NAMES)
def test_any_consumer_has_a_valid_name(database: str, consumer: str) -> None:
    """The name is one that PostgreSQL takes, the same each time, and begins with ours."""
    name = slot_name(database, consumer)
    assert re.fullmatch(r"pgsignals_[a-z0-9_]*_[0-9a-f]{8}", name)
    assert len(name) <= 63
    assert name == slot_name(database, consumer)


@given(st.lists(st.tuples(NAMES, NAMES), unique=True, min_size=2, max_size=50))
def test_other_consumers_have_other_names(given: list[tuple[str, str]]) -> None:
    """Neither case, length, a character that is left out nor another database is lost."""
    assert len({slot_name(*each) for each in given}) == len(given)


def test_a_name_shows_whose_it_is() -> None:
    """The consumer's name is found in it, as far as there is room."""
    assert slot_name("shop", "Mailer/kafka").startswith("pgsignals_mailer_kafka_")
    assert slot_name("shop", string.ascii_letters * 3).startswith("pgsignals_abc")
    assert slot_name("shop", "a") != slot_name("sho", "pa")


@pytest.fixture
def db(each_dsn: str, connect: Callable[[str], Database]) -> Database:
    """A database whose log can be decoded."""
    return connect(each_dsn)


@pytest.fixture
def name(db: Database) -> str:
    """A slot's name that no other test uses."""
    [(database,)] = db("SELECT current_database()")
    return slot_name(database, "mailer")


def test_a_slot_is_made_and_dropped(db: Database, name: str) -> None:
    """It is there between, with the position that it was made at; dropping it twice is no error."""
    assert look(db, name) is None
    began = create(db, name, db.connection.server_version, 5.0)
    found = look(db, name)
    assert found is not None
    [(database,)] = db("SELECT current_database()")
    assert (found.name, found.plugin, found.database) == (name, "pgoutput", database)
    assert found.confirmed == began
    assert found.restart is not None
    assert 0 < found.restart <= began
    assert found.status == "reserved"
    assert found.safe_size is not None
    assert found.safe_size > 0
    assert (found.temporary, found.active_pid, found.invalidation) == (False, None, "")
    # Standbys can have it from PostgreSQL 17 on.
    assert found.failover == (db.connection.server_version >= 170000)
    drop(db, name)
    assert look(db, name) is None
    drop(db, name)


def test_a_search_path_deceives_nobody(db: Database, name: str) -> None:
    """Functions and operators of another schema are not called."""
    db("CREATE SCHEMA evil")
    for left, right, result in (
        ("name", "text", "bool"),
        ("name", "name", "bool"),
        ("int", "int", "bool"),
    ):
        db(
            f"CREATE FUNCTION evil.pg_evil({left}, {right}) RETURNS {result}"
            " LANGUAGE plpgsql AS $$BEGIN RAISE 'deceived'; END$$"
        )
        db(f"CREATE OPERATOR evil.= (FUNCTION = evil.pg_evil, LEFTARG={left}, RIGHTARG={right})")
    db("SET search_path TO evil, pg_catalog")
    create(db, name, db.connection.server_version, 5.0)
    found = look(db, name)
    assert found is not None
    assert not end_holder(db, found)
    drop(db, name)


def test_a_slot_that_is_held(db: Database, name: str) -> None:
    """Its holder is known, cannot be dropped under, and is ended when that is asked for."""
    create(db, name, db.connection.server_version, 5.0)
    with closing(
        psycopg2.connect(db.dsn, connection_factory=LogicalReplicationConnection)
    ) as holder:
        holder.cursor().start_replication(
            name, options={"proto_version": "1", "publication_names": "p"}
        )
        held = look(db, name)
        assert held is not None
        assert held.active_pid == holder.info.backend_pid
        with pytest.raises(psycopg2.errors.ObjectInUse):
            drop(db, name)
        assert end_holder(db, held)
        eventually(
            lambda: look(db, name), lambda slot: slot is not None and slot.active_pid is None
        )
        # The session is gone, so that nobody else is ended for it.
        assert not end_holder(db, held)
    drop(db, name)


def test_a_slot_that_is_lost(db: Database, name: str) -> None:
    """A slot whose WAL has been removed says so, on each version in its own words."""
    create(db, name, db.connection.server_version, 5.0)
    db("ALTER SYSTEM SET max_slot_wal_keep_size TO '1MB'")
    try:
        db("SELECT pg_reload_conf()")
        kept = eventually(
            lambda: look(db, name), lambda slot: slot is not None and slot.safe_size is not None
        )
        assert kept is not None
        assert kept.invalidation == ""
        for _ in range(3):
            # A switch does nothing in a segment that nothing has been written to.
            db("SELECT pg_logical_emit_message(false, 'pgsignals', 'x')")
            db("SELECT pg_switch_wal()")
        db("CHECKPOINT")
        lost = eventually(
            lambda: look(db, name), lambda slot: slot is not None and slot.status == "lost"
        )
        assert lost is not None
        assert lost.invalidation == "wal_removed"
    finally:
        db("ALTER SYSTEM RESET max_slot_wal_keep_size")
        db("SELECT pg_reload_conf()")
        drop(db, name)
