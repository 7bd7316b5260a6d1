"""The status of a broker that events are forwarded to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BackendStatus:
    """The status of one broker of ``backends`` at one moment.

    ``depth`` counts events that wait for its acknowledgement, ``delivered`` those that have it,
    ``lost`` those that were dropped since its queue was full, each of which a Gap has announced;
    ``failures`` counts tries that failed, and ``error`` is why the latest did, empty when the try
    after it succeeded. ``ready``: the latest try succeeded, and nothing is being dropped.

    In durable delivery, ``active`` is whether this process reads for the broker, rather than
    standing by, and ``lag`` the age, in seconds, of the oldest event that waits for it here.
    """

    name: str
    ready: bool
    depth: int = 0
    delivered: int = 0
    lost: int = 0
    failures: int = 0
    error: str = ""
    active: bool = True
    lag: float = 0.0
