"""A typed ``env.py`` of Alembic."""

from __future__ import annotations

from alembic import context
from sqlalchemy import MetaData, create_engine

import pgsignals
import pgsignals.contrib.alembic

WATCHERS = [pgsignals.watch("orders", "updated", columns=["status"])]


def migrate() -> None:
    with create_engine("postgresql+psycopg2:///shop").connect() as connection:
        context.configure(
            connection=connection, target_metadata=MetaData(), pgsignals_watchers=WATCHERS
        )
        with context.begin_transaction():
            context.run_migrations()
