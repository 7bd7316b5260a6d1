"""What is inside of a Hub, for the few tests of what nothing public tells or does.

A test asks ``status()``, ``health()``, the database, or a receiver. That a refused receiver leaves
nothing behind, which of two sources of one process is broken or late, and which locks a fork finds
held, none of them says. All access to private attributes of a Hub is here, so that a change of them
is a change of this file.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

from pgsignals import Hub
from pgsignals.dispatch.registry import Subscription
from pgsignals.sources.durable import DurableSource


def source(hub: Hub) -> Any:
    """What reads for the receivers of a Hub that runs."""
    return cast(Any, hub._delivery).source


def relay_source(hub: Hub) -> DurableSource:
    """What reads for the only broker of a Hub in outbox delivery."""
    [forwarder] = cast(Any, hub._delivery)._forwarders
    return cast(DurableSource, forwarder.source)


def tail_source(hub: Hub) -> DurableSource:
    """What reads for the browsers of a Hub in outbox delivery; made now, unless it is there."""
    tail = hub._tail()
    assert tail is not None
    return tail.source


def subscriptions(hub: Hub) -> list[Subscription]:
    """All that listen through a subscription, streams included."""
    return hub._registry.subscriptions


def listening(hub: Hub) -> list[Any]:
    """All that listen to events, be it through a subscription or a blinker signal."""
    return hub._registry.everybody()


def gap_receivers(hub: Hub) -> list[Any]:
    """All that are told of Gaps."""
    return list(hub._callbacks.gap_receivers)


def collected(hub: Hub) -> int:
    """How many records the only batch receiver has yet to be called with."""
    [batcher] = hub._callbacks.timer._batchers
    return len(batcher._latest)


def locks(hub: Hub) -> tuple[AbstractContextManager[Any], ...]:
    """What a thread of the parent may hold at a fork."""
    return hub._registry._lock, hub._lock


def break_pages(source: DurableSource, broken: Any) -> None:
    """Have a source, and no other one of the process, call ``broken`` to read a page."""
    source._poller.read_page = broken  # type: ignore[method-assign]


def knowledge(hub: Hub) -> list[str]:
    """What the source of a Hub in outbox delivery knows, for who wonders why nothing comes."""
    reading = source(hub)
    return [
        f"{[each.trigger for each in reading.triggers._definitions]}",
        f"{reading._decoder.channels}, foreign {reading.foreign}",
        *(f"{vars(part)}, {vars(part.reader)}" for part in reading._claims.parts.values()),
    ]
