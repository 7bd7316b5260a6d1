"""Resume tokens: they come back as they were, and nobody makes one up."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.msgpack import encode

from pgsignals.consumers.signed_tokens import LONGEST, NOWHERE, Signer
from pgsignals.outbox.resume_tokens import (
    ALL,
    Emptied,
    ResumePoint,
    TokenCodec,
)
from pgsignals.postgres.snapshot import Snapshot

json = st.recursive(st.integers(-(1 << 63), 1 << 63) | st.floats() | st.text(), st.lists)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """A snapshot, as PostgreSQL gives it."""
    xmin = draw(st.integers(1, 1 << 48))
    running = draw(st.sets(st.integers(0, 200), max_size=20))
    xmax = xmin + max(running, default=0) + draw(st.integers(1, 50))
    return Snapshot(xmin, xmax, tuple(sorted(xmin + each for each in running)))


@st.composite
def points(draw: st.DrawFn) -> ResumePoint:
    """A point, at the end of a window or within one."""
    floor = draw(st.integers(0, 1 << 60))
    high = floor + draw(st.integers(0, 1000))
    since, shed = draw(snapshots()), draw(st.integers(0, 1 << 40))
    if draw(st.booleans()):
        return ResumePoint(since, floor, high, shed)
    within = draw(st.integers(0, 1 << 60)), draw(st.sampled_from((0, 7, ALL)))
    return ResumePoint(since, floor, high, shed, draw(snapshots()), *within)


@given(points())
def test_a_place_comes_back(point: ResumePoint) -> None:
    """A text is read as the point that it was made of, with the same key and history alone."""
    codec = TokenCodec("key", "1-2/3")
    text = codec.encode(point)
    assert text.isascii()
    assert text.isprintable()
    assert codec.decode(text) == point
    assert TokenCodec("other", "1-2/3").decode(text) is None
    assert TokenCodec("key", "1-2/4").decode(text) is None


@given(points())
def test_a_place_among_the_rows_of_other_triggers(point: ResumePoint) -> None:
    """Another version of an application reads a point between two windows, and none within one."""
    text = TokenCodec("key", "1-2/3", "ours").encode(point)
    assert TokenCodec("key", "1-2/3", "ours").decode(text) == point
    theirs = TokenCodec("key", "1-2/3", "theirs").decode(text)
    assert theirs == (point if point.target is None else None)


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_anything_else_is_no_place(text: str) -> None:
    """Whatever a client sends, it is refused and raises nothing."""
    assert TokenCodec("key", "1-2/3").decode(text) is None


def signed(data: bytes) -> str:
    """A token of any data, with our signature."""
    made = data + Signer("key", "1-2/3")._signature(data, b"")
    return base64.urlsafe_b64encode(made).rstrip(b"=").decode()


SNAPSHOT = [100, 10, [1, 2]]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"b",
        b"\1\2\3",
        b"b\xc1",
        b"b" + b"\xff" * 40,
        b"w" + encode([SNAPSHOT, 5, 0, 0]),
        b"b" + encode([SNAPSHOT, 5, 0, 0, SNAPSHOT, 1, 2]),
        b"b" + encode([SNAPSHOT, 5, 0, 0]) + b"\0",
        b"b" + encode([SNAPSHOT, 5, -1, 0]),
        b"b" + encode([SNAPSHOT, 5, 1 << 63, 0]),
        b"b" + encode([SNAPSHOT, 5, 0, 0.0]),
        b"b" + encode([[0, 10, []], 5, 0, 0]),
        b"b" + encode([[100, 10, [10]], 5, 0, 0]),
        b"b" + encode([[100, 10, [0] * (LONGEST + 1)], 5, 0, 0]),
    ],
)
def test_signed_nonsense_is_no_place(data: bytes) -> None:
    """Nor is what has our signature, and is not what this version writes."""
    assert TokenCodec("key", "1-2/3").decode(signed(b"b" + encode([SNAPSHOT, 5, 0, 0]))) is not None
    assert TokenCodec("key", "1-2/3").decode(signed(data)) is None


@given(st.sampled_from([b"b", b"w"]), st.binary() | json.map(encode))
def test_any_signed_data_is_read_or_refused(form: bytes, data: bytes) -> None:
    """Whatever the data, it raises nothing; what is read as a point has a token of its own."""
    codec = TokenCodec("key", "1-2/3")
    if (point := codec.decode(signed(form + data))) is not None:
        assert codec.decode(codec.encode(point)) == point


def test_too_many_transactions_at_once() -> None:
    """A point whose text would be longer than headers may be has one that leads nowhere."""
    running = tuple(range(100, 8000, 2))
    point = ResumePoint(Snapshot(100, 9000, running), 0, 0, 0)
    codec = TokenCodec("key", "1-2/3")
    assert codec.encode(point) == NOWHERE
    assert codec.decode(NOWHERE) is None
    few = ResumePoint(Snapshot(100, 9000, running[:1000]), 0, 0, 0)
    assert len(codec.encode(few)) < LONGEST // 2


@pytest.mark.parametrize(
    ("emptied", "snapshot", "lacks"),
    [
        (50, "20:20:", False),  # Below all that is not known.
        (150, "20:20:", True),  # 12 was running, and has ended before that was emptied.
        (150, "12:20:12", False),  # It was running still, and so has left nothing there.
        (201, "12:20:12", True),  # Later transactions may have.
    ],
)
def test_what_is_gone(emptied: int, snapshot: str, lacks: bool) -> None:
    """What was emptied matters to who may not have known all of it."""
    point = ResumePoint(Snapshot(12, 15, (12,)), 100, 200, 0)
    assert point.lacks(Emptied(emptied, Snapshot.parse(snapshot))) is lacks
