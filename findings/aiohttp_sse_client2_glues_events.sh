#!/bin/sh
# aiohttp-sse-client2: what had come of an event when the connection broke is put before the next event of
# the new connection, and lends it its type.
#
# aiohttp-sse-client2 0.3.0, aiohttp 3.14.5. The standard that its docstrings refer to (Server-Sent Events,
# "Interpreting an event stream") has pending data discarded at the end of a stream; the client, which
# connects again by itself, and asks by Last-Event-ID for the event that was cut off, keeps it. The server's
# repetition is so glued to its own half. Where the server has no ids, and goes on with what is new, an event
# of one type becomes one of another. No error, no warning; sseclient-py, which does not connect again, hands
# the half out. It takes a response that ends with the connection, as many servers and proxies send it. Seen:
#
#   cut within the data, sent again: [(None, '41', '1'), (None, '42\n4200', '2')]
#   cut before the empty line, sent again: [(None, '41', '1'), (None, '4200\n4200', '2')]
#   cut after its type, another comes: [('added', '41', ''), ('removed', '43', '')]
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet aiohttp-sse-client2==0.3.0 aiohttp==3.14.5
cat > "$folder/show.py" <<'PYTHON'
import asyncio
import sys
from datetime import timedelta

from aiohttp_sse_client2.client import EventSource

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
FIRST = "id: 1\ndata: 41\n\n"
AGAIN = "id: 2\ndata: 4200\n\n"
CASES = {  # what is sent on the first connection, and on the second
    "cut within the data, sent again": (FIRST + "id: 2\ndata: 42", AGAIN),
    "cut before the empty line, sent again": (FIRST + "id: 2\ndata: 4200\n", AGAIN),
    "cut after its type, another comes": (
        "event: added\ndata: 41\n\nevent: removed\n",
        "data: 43\n\n",
    ),
}


async def received(connections):
    asked = []

    async def serve(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        asked.append([line for line in head.splitlines() if line.startswith("last-event-id")])
        writer.write(HEAD + connections[len(asked) - 1].encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    events = []
    source = EventSource(f"http://127.0.0.1:{port}/", reconnection_time=timedelta(0))
    async with server, source:
        async for event in source:
            events.append((event.type, event.data, event.last_event_id))
            if len(events) == 2:
                break
    assert asked == [[], ["last-event-id: 1"] if "id:" in connections[0] else []], asked
    return events


async def show():
    seen = []
    for title, connections in CASES.items():
        seen.append(await received(connections))
        print(f"{title}: {seen[-1]}")
    return seen


seen = asyncio.run(asyncio.wait_for(show(), 60))
expected = [
    [(None, "41", "1"), (None, "42\n4200", "2")],
    [(None, "41", "1"), (None, "4200\n4200", "2")],
    [("added", "41", ""), ("removed", "43", "")],
]
sys.exit(0 if seen == expected else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
