"""Post each change of an order to an HTTP service: python webhook.py URL [DSN]

The secret is WEBHOOK_SECRET: ``whsec_`` and base64, as in Standard Webhooks.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress

import msgspec

import pgsignals

TRIES = 6
FIRST_PAUSE = 0.25  # seconds; doubled after each try
TIMEOUT = 10  # seconds


def sign(secret: str, uid: str, timestamp: int, body: bytes) -> str:
    """The signature header."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{uid}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


class Sender:
    """Posts events to one URL."""

    def __init__(self, url: str, secret: str) -> None:
        self._url = url
        self._secret = secret
        self._stopping = threading.Event()

    def send(self, event: pgsignals.Event) -> None:
        """Post the event, again and again if need be. Raises OSError when that fails for good."""
        data = {"type": f"{event.table}.{event.op}", "timestamp": event.at, "data": event.to_dict()}
        body = msgspec.json.encode(data, enc_hook=str)
        for number in range(TRIES):
            try:
                self._post(event.uid, body)
                return
            except OSError as error:
                status = error.code if isinstance(error, urllib.error.HTTPError) else None
                final = status is not None and status < 500 and status not in (408, 429)
                if final or number == TRIES - 1:
                    raise
                logging.warning("%s: %s; trying again", event.uid, error)
                if self._stopping.wait(FIRST_PAUSE * 2**number * random.uniform(0.5, 1)):
                    raise

    def stop(self) -> None:
        """Begin no further try."""
        self._stopping.set()

    def _post(self, uid: str, body: bytes) -> None:
        timestamp = int(time.time())
        headers = {
            "content-type": "application/json",
            "webhook-id": uid,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._secret, uid, timestamp, body),
        }
        request = urllib.request.Request(self._url, body, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT):
            pass


def main() -> None:
    logging.basicConfig(format="%(message)s")
    url = sys.argv[1]
    dsn = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("PGSIGNALS_DSN", "")
    sender = Sender(url, os.environ["WEBHOOK_SECRET"])
    pgsignals.subscribe(sender.send, "orders")
    orders = pgsignals.watch("orders", extra=["customer", "total", "status"])
    with pgsignals.start(dsn, [orders], workers=8) as hub:
        print(f"posting changes of orders to {url}; Ctrl-C ends", flush=True)
        with suppress(KeyboardInterrupt):
            hub.wait()
        sender.stop()


if __name__ == "__main__":
    main()
