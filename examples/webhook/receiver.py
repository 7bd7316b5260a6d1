"""The other side: print each webhook that is signed as it should be: python receiver.py PORT"""

from __future__ import annotations

import hmac
import os
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

from webhook import sign

TOLERANCE = 300  # seconds that a signature is good for


class Handler(BaseHTTPRequestHandler):
    """Answers 204 to what is genuine, whether new or repeated, and 401 to anything else."""

    # In a real service a table with a unique column, written in the transaction of the work.
    seen: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        uid = self.headers.get("webhook-id", "")
        genuine = self._is_genuine(uid, body)
        if genuine and uid not in self.seen:
            self.seen.add(uid)
            print(body.decode(), flush=True)
        self.send_response(204 if genuine else 401)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Print nothing but webhooks."""

    def _is_genuine(self, uid: str, body: bytes) -> bool:
        timestamp = self.headers.get("webhook-timestamp", "")
        if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE:
            return False
        expected = sign(os.environ["WEBHOOK_SECRET"], uid, int(timestamp), body)
        given = self.headers.get("webhook-signature", "").split()
        return any(hmac.compare_digest(expected.encode(), each.encode()) for each in given)


if __name__ == "__main__":
    with HTTPServer(("localhost", int(sys.argv[1])), Handler) as server:
        print(f"listening on port {server.server_port}; Ctrl-C ends", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
