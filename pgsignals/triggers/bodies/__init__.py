"""The bodies of the trigger functions, by what they write to."""

from __future__ import annotations

from collections.abc import Mapping

from ...core.transport import Transport
from . import notify, outbox, wal

BODIES: Mapping[Transport, str] = {
    Transport.NOTIFY: notify.BODY,
    Transport.OUTBOX: outbox.BODY,
    Transport.WAL: wal.BODY,
}
