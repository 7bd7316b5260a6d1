"""Web servers in processes of their own, and tabs that listen to them."""

from __future__ import annotations

import http.client
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tests.commands import Program
from tests.conftest import DEADLINE
from tests.event_source import Browser


class Served:
    """A server of tests.flask_shop, and what its processes have printed."""

    def __init__(self, program: Program, port: int) -> None:
        self.program = program
        self.port = port
        self.heard: dict[int, list[str]] = defaultdict(list)

    def request(self, method: str = "GET", path: str = "/") -> str:
        """The body of an answer that is well."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read().decode()
        finally:
            connection.close()
        assert answer.status == 200, body
        return body

    def read_until(self, done: Callable[[], bool]) -> None:
        """Read what the processes print until ``done()``."""
        while not done():
            # Flask announces itself on stdout too.
            if found := re.fullmatch(r"(\d+) (.*\S) *", self.program.out()):
                self.heard[int(found[1])].append(found[2])

    def end(self) -> None:
        """End it at SIGTERM; nothing is left to read, and no process raised anything."""
        self.program.process.terminate()
        end = self.program.end()
        assert not any("Traceback" in line for line in end.err), end.err


class Tab:
    """A browser's tab with an EventSource, over a real connection."""

    def __init__(self, port: int, path: str = "/events", browser: Browser | None = None) -> None:
        self.browser = browser or Browser()
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        headers = {"Last-Event-ID": self.browser.last_id} if self.browser.last_id else {}
        self.connection.request("GET", path, headers=headers)
        self.response = self.connection.getresponse()
        assert self.response.status == 200
        self._buffer = b""

    def more(self) -> bool:
        """Take in the next piece; whether there was one."""
        piece = self.response.read1()
        self._buffer += piece
        whole, end, self._buffer = self._buffer.rpartition(b"\n\n")
        self.browser.receive(whole + end)
        return bool(piece)

    def wait(self, count: int) -> list[Any]:
        """The ids, or reasons of gaps, of the first messages."""
        messages = self.browser.messages
        while len(messages) < count:
            assert self.more(), f"the stream ended after {messages}"
        return [data["reason"] if kind == "gap" else data["id"] for kind, data in messages[:count]]

    def close(self) -> None:
        """Close the tab."""
        self.response.close()
        self.connection.close()
