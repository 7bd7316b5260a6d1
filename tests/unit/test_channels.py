"""Which rows of which channel are read, where a watcher has had several definitions."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from pgsignals.consumers.channels import Channel, elsewhere, wanted
from pgsignals.core.payload import Layout

ROWS = range(1, 100)


def channels(**since: int) -> dict[int, Channel]:
    """Channels of one watcher, by the ids since when they are the watcher's."""
    layout = Layout("default", "public", "orders", "inserted", None, "", (), (), (), (), False)
    return {ord(name): Channel(ord(name), at, layout) for name, at in since.items()}


@pytest.mark.parametrize(
    "since",
    [{"a": 10}, {"a": 10, "b": 20}, {"a": 10, "b": 20, "c": 30}, {"b": 20, "a": 40}],
    ids=lambda since: "-".join(since),
)
def test_one_channel_at_a_time(since: dict[str, int]) -> None:
    """While the triggers of several definitions are there, each row is read from one of them."""
    own = ord(max(since, key=since.__getitem__))
    ids = wanted(own, channels(**since))
    for row in range(min(since.values()), 100):
        readers = [
            chr(key)
            for key, ranges in ids.items()
            if any(first <= row and (end is None or row < end) for first, end in ranges)
        ]
        assert readers == [
            max((name for name in since if since[name] <= row), key=since.__getitem__)
        ]


def test_a_younger_definition_is_not_read() -> None:
    """Who still has the former definition reads that, and not its successor."""
    ids = wanted(ord("a"), channels(a=10, b=20))
    assert ids[ord("a")][-1] == (10, None)
    assert all(end is not None and end <= 10 for _, end in ids[ord("b")])


def test_channels_of_another_log() -> None:
    """The ids of two logs are not compared: a channel of the other one is known, and not read."""
    own = channels(a=10, b=20)
    other = replace(
        own[ord("a")],
        key=1,
        since=15,
        layout=msgspec.structs.replace(own[ord("a")].layout, delivery="wal"),
    )
    known = own | {1: other}
    assert wanted(ord("b"), known) == wanted(ord("b"), own)
    assert elsewhere(ord("b"), known) == [1]
    assert elsewhere(1, known) == [ord("a"), ord("b")]
