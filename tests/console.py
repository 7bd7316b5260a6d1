"""``pgsignals console`` in a process of its own, and requests of whoever asks it."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

from tests.commands import Program, Result
from tests.conftest import DEADLINE


@dataclass(frozen=True)
class Answer:
    """An answer: its status, its headers by their names in small letters, and its text."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def data(self) -> Any:
        """What the answer's JSON says."""
        return json.loads(self.text)


@dataclass
class Console:
    """A running console, at ``url``."""

    program: Program
    url: str
    cookies: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        """The port that it listens at."""
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def ask(
        self,
        path: str = "/",
        data: Mapping[str, Any] | None = None,
        method: str | None = None,
        **headers: str,
    ) -> Answer:
        """Ask as a browser that has the cookies so far; with ``data``, by a POST."""
        host = urlsplit(self.url).hostname or ""
        connection = http.client.HTTPConnection(host, self.port, timeout=DEADLINE)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        body = None
        if data is not None:
            body = urlencode(data, doseq=True)
            sent["Content-Type"] = "application/x-www-form-urlencoded"
        connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
        response = connection.getresponse()
        text = response.read().decode()
        found = {name.lower(): value for name, value in response.getheaders()}
        connection.close()
        if cookie := re.match("([^=;]+)=([^;]+)", found.get("set-cookie", "")):
            self.cookies[cookie[1]] = cookie[2]
        return Answer(response.status, found, text)

    def token(self, **headers: str) -> str:
        """The token of a page, whose cookie is kept."""
        page = self.ask(**headers)
        found = re.search('data-token="([0-9a-f]{64})"', page.text)
        assert found is not None, page.text
        return found[1]

    def stranger(self) -> Console:
        """Another browser, without cookies."""
        return Console(self.program, self.url)

    def end(self) -> Result:
        """End it at Ctrl-C."""
        return self.program.interrupt()


@contextmanager
def console(dsn: str, *options: str, **variables: str) -> Iterator[Console]:
    """A console at any port; it is killed in the end, if it runs still."""
    program = Program("-m", "pgsignals", "console", "--port", "0", *options, dsn=dsn, **variables)
    try:
        line = program.err()
        found = re.search("at (http://[^ ]+)", line)
        assert found is not None, line
        yield Console(program, found[1])
    finally:
        program.process.kill()
        program.process.wait(DEADLINE)
