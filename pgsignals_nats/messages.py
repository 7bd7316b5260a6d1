"""Messages as NATS has them. The headers that many have in common are encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from pgsignals import Event
from pgsignals.cloudevents import Heading, header_name

from .connection import PREFIX
from .history import ID
from .options import SendingOptions

_CE_ID = header_name("id", PREFIX)
_EXPECTED_ID = "Nats-Expected-Last-Msg-Id"
# A message in the protocol of NATS: the subject, the lengths of the headers and of the whole.
_FRAME = b"HPUB %b %d %d\r\n%b%b%b\r\n"
_IDS = f"{ID}: %b\r\n{_CE_ID}: %b\r\n{_EXPECTED_ID}: %b\r\n\r\n".encode()
# More than a message's own ids take beside their texts, also when it is sent once more.
_IDS_LENGTH = len(f"{ID}: /\r\n{_CE_ID}: \r\n\r\n") + len(str(2**64))
# The length of the header that chains a message to another, without the name of that one.
CHAIN_LENGTH = len(f"{_EXPECTED_ID}: \r\n")
# The most topics whose headers are kept.
_MOST = 1_000


def safe(text: str) -> str:
    """Return a text as CloudEvents has it in headers: what is not printable ASCII as ``%HH``."""
    return text if text.isascii() and text.isprintable() and "%" not in text else quote(text)


class Origin:
    """What all messages of a topic have in common: where they go, and most of their headers."""

    __slots__ = ("encoded_subject", "headers", "lines", "subject", "table")

    def __init__(
        self, subject: str, table: tuple[str, str], stream: str, attributes: Mapping[str, str]
    ) -> None:
        self.subject = subject
        self.encoded_subject = subject.encode()
        self.table = "\0".join((*table, "")).encode()
        self.headers = {"Nats-Expected-Stream": stream, **_headers(attributes)}
        lines = "".join(f"{name}: {text}\r\n" for name, text in self.headers.items())
        self.lines = f"NATS/1.0\r\n{lines}".encode()


class Head:
    """What the messages of one statement have in common: all headers but those with ids.

    ``lines`` are the headers as they are sent. ``size`` is more than what they and the others take,
    but for the ids.
    """

    __slots__ = ("_more", "lines", "origin", "size")

    def __init__(self, origin: Origin, more: Mapping[str, str]) -> None:
        self.origin = origin
        self._more = more
        lines = [f"{header_name(name, PREFIX)}: {safe(text)}\r\n" for name, text in more.items()]
        self.lines = origin.lines + "".join(lines).encode()
        self.size = len(self.lines) + _IDS_LENGTH

    @property
    def headers(self) -> dict[str, str]:
        """The headers by their names."""
        return {**self.origin.headers, **_headers(self._more)}


@dataclass(eq=False, slots=True)
class Item:
    """A message, from when it is published to when it is acknowledged.

    ``record`` tells its record from others; it is None without a key. ``name`` is the id by which
    the server knows duplicates; ``again`` says that it is another one than at first. ``size`` is
    the length with the headers, which it does not exceed then either.
    """

    uid: str
    name: str
    head: Head
    payload: bytes
    record: bytes | None
    size: int
    again: bool = False
    sent_at: float = 0.0
    arrived: bool = False
    refused: bool = False

    def send_again(self, sequence: int) -> None:
        """Name it otherwise than the message that has this number, which it is no duplicate of."""
        # The same each time, so that the message is not there twice, whoever sends it.
        self.name = f"{safe(self.uid)}/{sequence}"
        self.again = True

    def headers(self, behind: str = "") -> dict[str, str]:
        """Return all headers; to be stored behind the message of a name only, if that is given."""
        found = {ID: self.name, _CE_ID: safe(self.uid), **self.head.headers}
        if behind:
            found[_EXPECTED_ID] = behind
        return found


def chained(items: Iterable[Item], behind: str) -> bytes:
    """Return messages as they are sent, each to be stored behind the one before it only.

    Nobody replies to them. ``behind`` is the name of the message before the first.
    """
    found = []
    before = behind.encode()
    for item in items:
        head, payload = item.head, item.payload
        name = item.name.encode()
        ids = _IDS % (name, name, before)
        length = len(head.lines) + len(ids)
        found.append(
            _FRAME
            % (head.origin.encoded_subject, length, length + len(payload), head.lines, ids, payload)
        )
        before = name
    return b"".join(found)


class Heads:
    """Makes the heads of messages."""

    def __init__(self, options: SendingOptions) -> None:
        self._options = options
        self._origins: dict[object, Origin] = {}

    def of(self, event: Event, heading: Heading) -> Head:
        """Return the head of an event, and of all that have the same heading."""
        origin = self._origins.get(heading.of_topic)
        if origin is None:
            options = self._options
            subject = options.subject_of(event.schema, event.table, event.op)
            table = (event.schema, event.table)
            origin = Origin(subject, table, options.stream_name, heading.common)
            if len(self._origins) >= _MOST:
                self._origins.clear()
            self._origins[heading.of_topic] = origin
        return Head(origin, heading.more)

    def of_gap(self, attributes: Mapping[str, str]) -> Head:
        """Return the head of a Gap."""
        more = {name: text for name, text in attributes.items() if name != "id"}
        options = self._options
        return Head(Origin(options.gap_subject, ("", ""), options.stream_name, {}), more)


def _headers(attributes: Mapping[str, str]) -> dict[str, str]:
    return {header_name(name, PREFIX): safe(text) for name, text in attributes.items()}
