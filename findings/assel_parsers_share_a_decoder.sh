#!/bin/sh
# assel: once a connection has been cut off within a character, every parser of the process, of each
# stream, raises a UnicodeDecodeError at whatever it is given, for good.
#
# assel 1.0.0. Its Parser is for one stream: its docstring has one create a Parser and pass it the chunks as
# they come in, unsplit. But all of them have one decoder of UTF-8, which is an attribute of the class, and
# keeps the first half of a character until its other half comes. The next chunk of any other stream takes
# the other half's place; the decoder raises, and keeps the half. The standard (Server-Sent Events, "Parsing
# an event stream") decodes each stream by itself, and has no errors: a half becomes U+FFFD. Two streams
# at once need no cut: a chunk that ends within a character is enough, which any proxy does. Seen:
#
#   whole events: ['x']
#   a stream that ends within a character: []
#   the connection anew: UnicodeDecodeError
#   a stream that was there before: UnicodeDecodeError
#   assel.parse: UnicodeDecodeError
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet assel==1.0.0
cat > "$folder/show.py" <<'PYTHON'
import sys

import assel

seen = []


def show(title, read):
    try:
        seen.append([event.data for event in read()])
    except UnicodeDecodeError as error:
        seen.append(type(error).__name__)
    print(f"{title}: {seen[-1]}")


whole = b"data: x\n\n"
cut = "data: caf\u00e9\n\n".encode()[: -len(b"\xa9\n\n")]
other = assel.Parser()
show("whole events", lambda: other.receive_bytes(whole))
show("a stream that ends within a character", lambda: assel.Parser().receive_bytes(cut))
show("the connection anew", lambda: assel.Parser().receive_bytes(whole))
show("a stream that was there before", lambda: other.receive_bytes(whole))
show("assel.parse", lambda: assel.parse([whole]))
expected = [["x"], [], *["UnicodeDecodeError"] * 3]
sys.exit(0 if seen == expected else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
