"""The blueprint: one page, its stream, and what it asks for by hand."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import psycopg2
from flask import Blueprint, Response, abort, render_template, request
from werkzeug.exceptions import HTTPException

from ..contrib.event_stream import HEADERS, KEEPALIVE, encode
from ..core.errors import ConfigurationError, PgSignalsError
from ..core.json import to_json
from ..core.logging import log
from ..core.redaction import error_text
from ..overview.monitor import Monitor, Viewer
from .guards import Hosts, Tokens, is_our_page

# Whether who asks may see the console: True, or the user's name for the log; or a response to give.
Authorize = Callable[[], "bool | str | Response"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_RETRY_MS = 3000
_KEEPALIVE_SECONDS = 15.0
# A stream ends, and comes back, so that who looks on is asked again whether he may.
_LIFETIME_SECONDS = 900.0
_MOST_LETTERS = 1000
_MOST_PAGES = 64


def console(
    dsn: str,
    *,
    authorize: Authorize | None = None,
    allow_actions: bool = False,
    show_values: bool = False,
    name: str = "pgsignals_console",
    url_prefix: str | None = "/pgsignals",
) -> Blueprint:
    """Return a blueprint that shows the signals of the database at ``dsn``.

    ``authorize`` is called with each request, in its context: it returns whether the console may be
    seen, a text that is the user's name in the log, or a response (a redirect to a login, say).

    It is read only unless ``allow_actions``: then dead letters can be retried and dropped.
    With ``show_values``, events and dead letters show what rows hold.

    Raises ConfigurationError without ``authorize``.
    """
    if authorize is None:
        raise ConfigurationError(
            "console() needs authorize=: a function that says whether who asks may see the "
            "console, such as authorize=lambda: current_user.is_admin. It shows tables, errors and "
            "tracebacks."
        )
    if not callable(authorize):
        raise ConfigurationError(f"authorize={authorize!r}: give a function without parameters.")
    monitor = Monitor(dsn, values=show_values)
    return make_blueprint(monitor, authorize, allow_actions, show_values, None, name, url_prefix)


def make_blueprint(
    monitor: Monitor,
    authorize: Authorize,
    allow_actions: bool,
    show_values: bool,
    hosts: Hosts | None,
    name: str = "pgsignals_console",
    url_prefix: str | None = None,
    most_streams: int = 100,
) -> Blueprint:
    """Return the blueprint of a monitor; ``hosts`` are the names by which it may be asked for."""
    blueprint = Blueprint(
        name,
        __name__,
        url_prefix=url_prefix,
        static_folder="static",
        static_url_path="/static",
        template_folder="templates",
    )
    tokens = Tokens(name)
    pages = _Pages(monitor)

    @blueprint.before_request
    def admit() -> Response | None:
        if hosts is not None and not hosts.knows(request.host):
            abort(
                _refusal(
                    421,
                    "The console does not go by this name. Start it with --hostname NAME, or ask "
                    "for it by its address.",
                )
            )
        answer = authorize()
        if isinstance(answer, Response):
            return answer
        if not answer:
            abort(_refusal(403, "You may not see the console."))
        request.environ["pgsignals.console.user"] = answer if isinstance(answer, str) else ""
        return None

    @blueprint.after_request
    def secure(response: Response) -> Response:
        for header, value in _HEADERS.items():
            response.headers[header] = value
        return response

    @blueprint.errorhandler(PgSignalsError)
    @blueprint.errorhandler(psycopg2.Error)
    def failed(error: Exception) -> Response:
        return _json({"error": error_text(error)}, 409)

    @blueprint.errorhandler(HTTPException)
    def refused(error: HTTPException) -> Response:
        return _json({"error": error.description}, error.code or 500)

    @blueprint.get("/")
    def page() -> Response:
        token = tokens.of(request)
        response = Response(
            render_template(
                "pgsignals/console.html",
                name=name,
                actions=allow_actions,
                values=show_values,
                token=token.text,
            )
        )
        tokens.keep(token, response, f"{request.script_root}{request.path}")
        return response

    @blueprint.get("/stream")
    def stream() -> Response:
        if monitor.viewers >= most_streams:
            return Response(encode(retry=10 * _RETRY_MS), headers=dict(HEADERS), status=200)
        polled = not request.environ.get("wsgi.multithread", True)
        return Response(_Stream(monitor, polled), headers=dict(HEADERS))

    @blueprint.get("/dead-letters")
    def letters() -> Response:
        before = request.args.get("before", type=int)
        return _text(pages.letters(before, request.args.get("consumer", "")))

    @blueprint.get("/dead-letters/<int:key>")
    def letter(key: int) -> Response:
        return _json(monitor.ask(lambda reader: reader.letter(key)))

    @blueprint.get("/watchers/<name>")
    def watcher(name: str) -> Response:
        if not re.fullmatch("[a-z0-9_]{1,63}", name):
            abort(_refusal(404, "There is no such watcher."))
        return _json({"sql": monitor.ask(lambda reader: reader.definition(name))})

    @blueprint.post("/check")
    def check() -> Response:
        _check_forgery(tokens)
        monitor.ask(lambda reader: reader.check_again(), look=True)
        return _json({"done": "The checks are made again."})

    @blueprint.post("/dead-letters/<any(retry, drop):action>")
    def act(action: str) -> Response:
        _check_forgery(tokens)
        if not allow_actions:
            abort(_refusal(403, "The console is read only: start it with --allow-actions."))
        keys = _keys(request.form.getlist("id"))
        if action == "retry":
            count = monitor.ask(lambda reader: reader.retry(keys), look=True)
        else:
            count = monitor.ask(lambda reader: reader.drop(keys), look=True)
        done = {"retry": "retried", "drop": "dropped"}[action]
        user = request.environ["pgsignals.console.user"]
        log.info(
            "console: %s%s %s %d dead letters: %s",
            request.remote_addr,
            f" ({user})" if user else "",
            done,
            count,
            ", ".join(map(str, keys)),
        )
        return _json({"done": done, "count": count})

    return blueprint


def _keys(given: Iterable[str]) -> list[int]:
    found = list(dict.fromkeys(given))
    if not found or len(found) > _MOST_LETTERS:
        abort(_refusal(400, f"Give from 1 to {_MOST_LETTERS:,} dead letters."))
    if not all(re.fullmatch("[0-9]{1,18}", each) for each in found):
        abort(_refusal(400, "An id of a dead letter is a number."))
    return [int(each) for each in found]


def _check_forgery(tokens: Tokens) -> None:
    if not is_our_page(request) or not tokens.valid(request):
        log.warning("console: refused a forged request of %s", request.remote_addr)
        abort(_refusal(403, "This request does not come from the console's page: reload it."))


def _refusal(status: int, text: str) -> Response:
    return _json({"error": text}, status)


def _json(data: object, status: int = 200) -> Response:
    return _text(to_json(data), status)


def _text(text: str, status: int = 200) -> Response:
    return Response(text.encode(errors="replace"), status, mimetype="application/json")


@dataclass
class _Pages:
    """Pages of dead letters, asked of the database once for all who look at them."""

    monitor: Monitor
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _version: int = -1
    _found: dict[tuple[int | None, str], str] = field(default_factory=dict)

    def letters(self, before: int | None, consumer: str) -> str:
        with self._lock:
            version = self.monitor.version("letters")
            if version != self._version or len(self._found) >= _MOST_PAGES:
                self._version, self._found = version, {}
            key = (before, consumer)
            if key not in self._found:
                found = self.monitor.ask(lambda reader: reader.letters(before, consumer))
                self._found[key] = to_json({"letters": found})
            return self._found[key]


class _Stream:
    """One browser's messages, as they come, for the server to iterate over.

    Not a generator: one that has not begun would not be closed, and be counted for ever.
    """

    def __init__(self, monitor: Monitor, polled: bool) -> None:
        self._monitor = monitor
        self._polled = polled
        self._ends_at = time.monotonic() + _LIFETIME_SECONDS
        self._viewer: Viewer | None = Viewer(monitor)
        self._opened = False
        monitor.enter()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self._opened:
            self._opened = True
            return encode(retry=_RETRY_MS)
        viewer = self._viewer
        if viewer is None or self._monitor.closed or time.monotonic() >= self._ends_at:
            raise StopIteration
        pushes = viewer.wait(_KEEPALIVE_SECONDS)
        if self._polled:
            self._ends_at = 0.0
        return b"".join(encode(each.data, event=each.name) for each in pushes) or KEEPALIVE

    def close(self) -> None:
        """Look on no more; the server calls this, whatever has ended the response."""
        if self._viewer is not None:
            self._viewer = None
            self._monitor.leave()
