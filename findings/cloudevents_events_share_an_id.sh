#!/bin/sh
# CloudEvents' SDK for Python: events that are made of one dict of attributes have one id and one time.
#
# cloudevents 2.2.0 (the core package of version 2). CloudEvent's docstring has id default to a UUID4 and
# time to the present; they are put into the caller's dict, which the events then keep as theirs. The next
# event that is made of the same type and source is so the former one's duplicate: the specification
# (CloudEvents 1.0, "id") has consumers take events of equal source and id as duplicates, and what is sent
# as a JetStream message's id or a key loses it. cloudevents.v1, the former API in the same package, makes an
# id for each. Seen:
#
#   core: 1 id for 3 events; the caller's dict: id, source, specversion, time, type
#   v1: 3 ids for 3 events; the caller's dict: source, type
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cloudevents==2.2.0
cat > "$folder/show.py" <<'PYTHON'
import sys

import cloudevents.core.v1.event
import cloudevents.v1.http

core = {"type": "inserted", "source": "/orders"}
former = dict(core)
events = [cloudevents.core.v1.event.CloudEvent(core, {"number": n}) for n in range(3)]
ids = {event.get_id() for event in events}
print(f"core: {len(ids)} id for 3 events; the caller's dict: {', '.join(sorted(core))}")
events = [cloudevents.v1.http.CloudEvent(former, {"number": n}) for n in range(3)]
former_ids = {event["id"] for event in events}
print(f"v1: {len(former_ids)} ids for 3 events; the caller's dict: {', '.join(sorted(former))}")
same = (len(ids), len(core), len(former_ids), len(former)) == (1, 5, 3, 2)
sys.exit(0 if same else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
