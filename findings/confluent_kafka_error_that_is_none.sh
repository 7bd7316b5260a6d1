#!/bin/sh
# confluent-kafka: what a callback lets through comes out of poll() as a KafkaError, which is no
# exception: neither `except Exception` nor `except BaseException` catches it.
#
# confluent-kafka 2.16.1, Python 3.11 and older (from 3.12 on it is a KafkaException). A call of the
# client in a callback (here get_watermark_offsets in error_cb, in practice in on_assign) raises a
# KafkaException; poll(), which called the callback, raises its KafkaError instead. A thread that
# guards its loop by `except Exception` ends. No broker is needed: nothing listens at the address.
# Seen with Python 3.11.7:
#
#   caught by "except BaseException": False; it is a KafkaError, an exception: False
#
# Fails when that changes.
set -eu
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))' || {
  echo "skipped: give PYTHON=… of 3.10 or 3.11"
  exit 0
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet confluent-kafka==2.16.1
cat > "$folder/show.py" <<'PYTHON'
import sys

from confluent_kafka import Consumer, TopicPartition


def asks(error):
    consumer.get_watermark_offsets(TopicPartition("t", 0), timeout=0.1)


consumer = Consumer({"bootstrap.servers": "127.0.0.1:9", "group.id": "g", "error_cb": asks})
consumer.subscribe(["t"])
caught, kind, real = None, None, None
try:
    try:
        for _ in range(100):
            consumer.poll(0.1)
    except BaseException:
        caught, kind, real = True, *sys.exc_info()[:2]
except:
    caught, kind, real = False, *sys.exc_info()[:2]
exception = isinstance(real, BaseException)
name = getattr(kind, "__name__", None)
print(
    f'caught by "except BaseException": {caught}; it is a {name}, an exception: {exception}'
)
sys.exit(0 if (caught, name, exception) == (False, "KafkaError", False) else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" 2> /dev/null
