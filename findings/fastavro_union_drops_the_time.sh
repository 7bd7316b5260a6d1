#!/bin/sh
# fastavro: in a union of a date and a timestamp a datetime is written as the date, without its time.
#
# fastavro 1.13.1. A union of both is for what may be either, as in a calendar, whose events begin at a time
# or last a day. Where the date stands first it takes the datetime, which is a date to Python, although the
# specification (Avro 1.12, "Logical Types") has it be a day "with no reference to a particular time zone or
# time of day", and the other branch fits. No error on either side; the other way round both are kept, so
# that the order of two branches, which nothing else looks at, decides. The documentation has a tuple name
# the branch for dictionaries that fit two records; a datetime has a type of its own. confluent-kafka's
# AvroSerializer writes with fastavro. Seen:
#
#   union of            2026-03-01 09:30:00+01:00  2026-03-01
#   date, timestamp     2026-03-01                 2026-03-01
#   timestamp, date     2026-03-01 08:30:00+00:00  2026-03-01
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fastavro==1.13.1
cat > "$folder/show.py" <<'PYTHON'
import io
import sys
from datetime import datetime, timedelta, timezone

import fastavro

TYPES = {
    "date": {"type": "int", "logicalType": "date"},
    "timestamp": {"type": "long", "logicalType": "timestamp-micros"},
}


def through(union, value):
    schema = fastavro.parse_schema(["null", *(TYPES[name] for name in union)])
    file = io.BytesIO()
    fastavro.schemaless_writer(file, schema, value)
    file.seek(0)
    return str(fastavro.schemaless_reader(file, schema))


moment = datetime(2026, 3, 1, 9, 30, tzinfo=timezone(timedelta(hours=1)))
print(f"{'union of':19} {moment}  {moment.date()}")
seen = []
for union in (("date", "timestamp"), ("timestamp", "date")):
    seen.append((through(union, moment), through(union, moment.date())))
    print(f"{', '.join(union):19} {seen[-1][0]:25}  {seen[-1][1]}")
expected = [("2026-03-01", "2026-03-01"), ("2026-03-01 08:30:00+00:00", "2026-03-01")]
sys.exit(0 if seen == expected else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
