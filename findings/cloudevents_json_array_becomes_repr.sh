#!/bin/sh
# CloudEvents' SDK for Python: what is JSON but no object, an array or true, is sent as Python's repr.
#
# cloudevents 2.2.0 (the core package of version 2), in the binary mode of Kafka; HTTP, AMQP and RabbitMQ
# share the code. The specification (CloudEvents 1.0, Kafka protocol binding) has the value in the media
# type of datacontenttype, and the SDK reads JSON arrays, strings and numbers from such a value. A relay
# that hands on what it read, from_kafka_event and to_binary_event, so breaks the next reader, whose event
# still says application/json: for its readers the array is a str, true is the str "True", the string has
# lost its quotes, null is no value at all. Structured mode keeps them. Seen:
#
#   [{"id": 7, "note": null}] -> [{'id': 7, 'note': None}], read as str
#   true -> True, read as str
#   "7" -> 7, read as int
#   {"id": 7, "note": null} -> {"id": 7, "note": null}, read as dict
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cloudevents==2.2.0
cat > "$folder/show.py" <<'PYTHON'
import sys

from cloudevents.core.bindings.kafka import (
    KafkaMessage,
    from_kafka_event,
    from_structured_event,
    to_binary_event,
    to_structured_event,
)

headers = {
    "ce_specversion": b"1.0",
    "ce_id": b"1",
    "ce_source": b"/orders",
    "ce_type": b"inserted",
    "content-type": b"application/json",
}
seen = []
for value in b'[{"id": 7, "note": null}]', b"true", b'"7"', b'{"id": 7, "note": null}':
    event = from_kafka_event(KafkaMessage(headers, None, value))
    relayed = to_binary_event(event)
    kind = type(from_kafka_event(relayed).get_data()).__name__
    structured = from_structured_event(to_structured_event(event)).get_data() == event.get_data()
    print(f"{value.decode()} -> {relayed.value.decode()}, read as {kind}")
    seen.append((relayed.value, relayed.headers["content-type"], kind, structured))

json = b"application/json"
expected = [
    (b"[{'id': 7, 'note': None}]", json, "str", True),
    (b"True", json, "str", True),
    (b"7", json, "int", True),
    (b'{"id": 7, "note": null}', json, "dict", True),
]
sys.exit(0 if seen == expected else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
