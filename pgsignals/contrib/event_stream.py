"""The format of server-sent events, and the part of an event that a browser is told of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigurationError
from ..core.events import Event, Gap
from ..core.json import to_json
from ..core.logging import log

HEADERS: Mapping[str, str] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    # A response is for one browser, and nothing on the way may collect it into larger pieces.
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}
KEEPALIVE = b":\n\n"

_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_LONGEST_ID = 4096
# JavaScript's numbers are exact up to here.
_SAFE_INTEGER = 2**53 - 1


def encode(
    data: str | None = None,
    *,
    id: str | None = None,  # noqa: A002
    event: str | None = None,
    retry: int | None = None,
) -> bytes:
    """Return one message of a ``text/event-stream``. Without ``data``, no listener is called.

    The browser sends ``id`` back as Last-Event-ID, calls listeners of the type ``event``
    (``message`` without one), and connects again after ``retry`` milliseconds.
    Raises ConfigurationError for an ``id`` or ``event`` that would not arrive as it is.
    """
    lines = []
    if retry is not None:
        lines.append(f"retry: {retry}")
    for field, value in (("id", id), ("event", event)):
        if value is None:
            continue
        if _LINE_ENDS.search(value) or "\0" in value or value.startswith(" "):
            raise ConfigurationError(
                f"{field}={value!r}: a text without line ends and NUL that begins with no blank."
            )
        lines.append(f"{field}: {value}")
    if data is not None:
        lines += [f"data: {line}" for line in _LINE_ENDS.split(data)]
    # A text that is no Unicode (a lone surrogate) would make the whole message unsendable.
    return ("\n".join(lines or [":"]) + "\n\n").encode(errors="replace")


def last_event_id(header: str | None, query: str | None = None) -> str | None:
    """Return the id from which a browser goes on: that of its header, or of a query parameter.

    The first connection of an EventSource has no header ``Last-Event-ID``: a page that was rendered
    together with a feed's ``position`` gives it as a parameter. None if neither is there or
    sensible.
    """
    for given in (header, query):
        if given and len(given) <= _LONGEST_ID and given.isprintable():
            return given
    return None


def brief(event: Event) -> dict[str, Any]:
    """Return an event's data by default: they name the record, and tell nothing that it holds.

    Columns, former values and the context may be more than this user may see; a page that fetches
    the record by its id passes the application's own checks. An ``id`` that JavaScript's numbers
    cannot hold exactly is a text.
    """
    found: dict[str, Any] = {
        "op": event.op,
        "schema": event.schema,
        "table": event.table,
        "id": _exact(event.id),
        "at": event.at,
    }
    if event.label is not None:
        found["label"] = event.label
    return found


def _exact(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_exact(each) for each in value]
    if isinstance(value, int) and abs(value) > _SAFE_INTEGER:
        return str(value)
    return value


@dataclass(frozen=True)
class View:
    """The part of a feed that one client gets, and the form of its messages.

    ``visible`` says whether the client may know of an event. ``data`` makes the data of its
    message: a text is sent as it is (HTML, say), all else as JSON. ``name`` gives the type by which
    the browser listens, ``message`` without one. If one of them raises, the client gets a ``gap``
    in place of the event: it neither sees what it may not, nor misses the event without notice.
    """

    visible: Callable[[Event], bool] | None = None
    data: Callable[[Event], Any] | None = None
    name: Callable[[Event], str] | None = None


EVERYTHING = View()


def render(item: Event | Gap, view: View, id: str) -> bytes:  # noqa: A002
    """Return the message of an event or a gap; empty if the client may not know of the event."""
    if isinstance(item, Gap):
        return gap_message(item.reason, id, {"since": item.since, "until": item.until})
    try:
        if view.visible is not None and not view.visible(item):
            return b""
        data = (view.data or brief)(item)
        return encode(
            data if isinstance(data, str) else to_json(data),
            id=id,
            event=None if view.name is None else view.name(item),
        )
    except Exception:
        log.exception(
            "visible=, data= or name= raised: the browser gets a gap in place of the event",
            extra={"event_uid": item.uid, **item._message.topic.fields},
        )
        return gap_message("failed", id)


def gap_message(
    reason: str,
    id: str,  # noqa: A002
    times: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the message that says that something may be missing."""
    # Without the gap's detail, since PostgreSQL's messages are not for everybody.
    return encode(to_json({"reason": reason, **(times or {})}), id=id, event="gap")
