"""Who may ask: names of the host, tokens against forgery, and the password."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from flask import Request, Response, current_app, request

from ..core.errors import ConfigurationError
from ..core.logging import log

PASSWORD_VARIABLE = "PGSIGNALS_CONSOLE_PASSWORD"
_SHORTEST = 12
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?")


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is this machine's own, which no other one reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Hosts:
    """The names by which a browser may ask for the console.

    A page of somebody else's can have its own name lead here (DNS rebinding), and would then read
    what it likes: a name has to be known. An address cannot be made to lead elsewhere.
    """

    names: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, names: Iterable[str]) -> Hosts:
        return cls(frozenset(each.lower().rstrip(".") for each in names))

    def knows(self, header: str) -> bool:
        """Whether a Host header, with or without a port, is one of ours."""
        found = _HOST.fullmatch(header)
        if found is None:
            return False
        name = found[1].strip("[]").lower().rstrip(".")
        if name == "localhost" or name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


@dataclass(frozen=True)
class Token:
    """A browser's secret, which is in its cookie, and the text that its page sends along."""

    secret: str
    text: str
    new: bool


class Tokens:
    """Tokens by which a POST is known to come from a page that we gave to that browser.

    A page's text is derived from the browser's cookie by the application's secret key, so that all
    of its processes know it; without such a key, by one of this process.
    """

    def __init__(self, name: str) -> None:
        self._cookie = name
        self._own_key = secrets.token_bytes(32)

    def of(self, asked: Request) -> Token:
        """Return the token of the browser that asks, or a new one."""
        secret = asked.cookies.get(self._cookie, "")
        known = re.fullmatch("[A-Za-z0-9_-]{43}", secret) is not None
        if not known:
            secret = secrets.token_urlsafe(32)
        return Token(secret, self._derived(secret), not known)

    def keep(self, token: Token, response: Response, path: str) -> None:
        """Have the browser keep a new token."""
        if token.new:
            response.set_cookie(
                self._cookie,
                token.secret,
                path=path,
                httponly=True,
                samesite="Strict",
                secure=request.is_secure,
            )

    def valid(self, asked: Request) -> bool:
        """Whether a POST has the token of its browser's cookie."""
        token = self.of(asked)
        given = asked.form.get("token", "")
        return not token.new and hmac.compare_digest(given.encode(), token.text.encode())

    def _derived(self, secret: str) -> str:
        key = current_app.secret_key or self._own_key
        key = key.encode() if isinstance(key, str) else bytes(key)
        return hmac.new(key, f"{self._cookie} {secret}".encode(), hashlib.sha256).hexdigest()


def is_our_page(asked: Request) -> bool:
    """Whether a request comes from a page of the same host, as far as the browser says."""
    if asked.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
        return False
    origin = asked.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc == asked.host


class Login:
    """HTTP's basic authentication: any user's name, and the password."""

    def __init__(self, password: str) -> None:
        if len(password) < _SHORTEST:
            raise ConfigurationError(
                f"{PASSWORD_VARIABLE} has fewer than {_SHORTEST} characters: take a longer "
                "password, such as `openssl rand -base64 24` prints."
            )
        self._key = secrets.token_bytes(32)
        self._password = self._digest(password)

    def __call__(self) -> bool | str | Response:
        given = request.authorization
        if given is not None and given.type == "basic":
            # Digests have one length, so that the time tells nothing of the password's.
            if hmac.compare_digest(self._digest(given.password or ""), self._password):
                return given.username or True
            log.warning("console: a wrong password from %s", request.remote_addr)
        return Response(
            "The console asks for a password.\n",
            401,
            {"WWW-Authenticate": 'Basic realm="pgsignals console", charset="UTF-8"'},
            mimetype="text/plain",
        )

    def _digest(self, text: str) -> bytes:
        return hmac.new(self._key, text.encode(errors="surrogateescape"), hashlib.sha256).digest()
