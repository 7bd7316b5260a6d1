#!/bin/sh
# msgspec: a datetime whose offset from UTC has seconds is encoded in JSON as another moment.
#
# msgspec 0.23.0. Liberia was 44 minutes and 30 seconds behind UTC until 1972, Paris 9 minutes and 21
# seconds ahead until 1911, and so on; PostgreSQL's drivers return a timestamptz in the session's zone.
# "Supported Types" in the documentation says that datetimes are encoded by RFC 3339, whose offsets have
# no seconds. What one gets is neither an error nor the same moment at an offset that it has, as in
# MessagePack: the offset is rounded to minutes, and the time beside it is not. An age, an order or a key
# that is made of it changes on the way. Seen:
#
#   in Monrovia:         1970-01-01T12:00:00-00:44:30
#   msgspec.json:        1970-01-01T12:00:00-00:44, moved by -30 s
#   msgspec.to_builtins: 1970-01-01T12:00:00-00:44, moved by -30 s
#   msgspec.msgpack:     1970-01-01T12:44:30+00:00, moved by 0 s
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet msgspec==0.23.0 tzdata==2026.3
cat > "$folder/show.py" <<'PYTHON'
import sys
from datetime import datetime
from zoneinfo import ZoneInfo

import msgspec

moment = datetime(1970, 1, 1, 12, tzinfo=ZoneInfo("Africa/Monrovia"))
print("in Monrovia:        ", moment.isoformat())
found = {
    "json": msgspec.json.decode(msgspec.json.encode(moment), type=datetime),
    "to_builtins": msgspec.convert(msgspec.to_builtins(moment), datetime),
    "msgpack": msgspec.msgpack.decode(msgspec.msgpack.encode(moment), type=datetime),
}
moved = []
for name, back in found.items():
    moved.append(round((back - moment).total_seconds()))
    print(f"msgspec.{name + ':':12} {back.isoformat()}, moved by {moved[-1]} s")
sys.exit(0 if moved == [-30, -30, 0] else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
