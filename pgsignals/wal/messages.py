"""The messages that triggers, ``muted`` and ``context`` write into the write-ahead log.

Anybody may write messages with our prefix. Those of triggers have a secret in front. The others
concern the transaction alone that has written them, and are taken for what they say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..consumers.decoding import Row
from ..core.lsn import lsn_text
from ..postgres.transaction import CONTEXT_MESSAGE, MUTED_MESSAGE
from . import pgoutput

_MUTED, _CONTEXT = MUTED_MESSAGE.encode(), CONTEXT_MESSAGE.encode()


class Sent(Row, frozen=True, gc=False):
    """A trigger's message at ``lsn``; its id is the LSN of its transaction's commit.

    ``number`` counts the changes of the transaction before.
    """

    lsn: int
    number: int = 0

    @property
    def position(self) -> str:
        return lsn_text(self.lsn)


@dataclass(frozen=True)
class Mute:
    """From here on, the transaction's changes of rows are silent, or heard again."""

    on: bool


@dataclass(frozen=True)
class Context:
    """From here on, the transaction's changes of rows have this context, a text of JSON."""

    text: str


def parse_message(
    message: pgoutput.Message,
    is_secret: Callable[[bytes], bool],
    commit_lsn: int,
    encoding: str,
    number: int = 0,
) -> Sent | Mute | Context | None:
    """Return the meaning of a message with our prefix; None for one that is not ours."""
    word, _, rest = message.content.partition(b" ")
    if word == _MUTED:
        return Mute(rest == b"on")
    if word == _CONTEXT:
        return Context(rest.decode(encoding, "replace"))
    if is_secret(word):
        return _sent(message.lsn, commit_lsn, rest, encoding, number)
    return None


def _sent(lsn: int, commit_lsn: int, content: bytes, encoding: str, number: int) -> Sent | None:
    try:
        channel, relation, payload = content.split(b" ", 2)
        numbers = int(channel), int(relation)
    except ValueError:
        return None
    head, newline, rows = payload.decode(encoding, "replace").partition("\n")
    # The message's own LSN is its sequence: a trigger knows nothing else that is unique.
    text = f'{head[:-1]},"s":{lsn}}}{newline}{rows}'
    return Sent(commit_lsn, *numbers, text, lsn, number)
