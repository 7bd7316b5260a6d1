#!/bin/sh
# sseclient-py: an event that was cut off by the end of the connection is handed out as a whole one.
#
# sseclient-py 1.9.0. The standard that its docstring refers to (Server-Sent Events, "Interpreting an event
# stream") has pending data discarded where the stream ends before the empty line: the browser connects
# again, and is sent the event once more, by Last-Event-ID. Here the half comes out like any other event,
# with an id that vouches for it, so that the rest is never asked for. Half a number is a number; half a
# JSON document is an error. It takes a response that ends with the connection, as HTTP/1.0, and servers and
# proxies that close, send it. Seen, where the server sent 41 and 4200, and was stopped in the latter:
#
#   received: [('1', '41'), ('2', '42')]
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet sseclient-py==1.9.0
cat > "$folder/show.py" <<'PYTHON'
import http.client
import socket
import sys
import threading

from sseclient import SSEClient


def serve(listener):
    client = listener.accept()[0]
    with client:
        client.recv(65536)
        client.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            b"id: 1\ndata: 41\n\n"
            b"id: 2\ndata: 42"  # it was to be 4200, and an empty line
        )


with socket.create_server(("127.0.0.1", 0)) as listener:
    server = threading.Thread(target=serve, args=(listener,))
    server.start()
    connection = http.client.HTTPConnection(*listener.getsockname(), timeout=10)
    connection.request("GET", "/")
    response = connection.getresponse()
    received = [(event.id, event.data) for event in SSEClient(response).events()]
    server.join()
print("received:", received)
sys.exit(0 if received == [("1", "41"), ("2", "42")] else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
