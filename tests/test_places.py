"""Places in the outbox as texts: they come back as they were, and nobody makes one up."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgsignals.outbox.cursors import Snapshot
from pgsignals.outbox.places import ALL, LONGEST, NOWHERE, Emptied, Place, Signer, covers


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """A snapshot, as PostgreSQL gives it."""
    xmin = draw(st.integers(1, 1 << 48))
    running = draw(st.sets(st.integers(0, 200), max_size=20))
    xmax = xmin + max(running, default=0) + draw(st.integers(1, 50))
    return Snapshot(xmin, xmax, tuple(sorted(xmin + each for each in running)))


@st.composite
def places(draw: st.DrawFn) -> Place:
    """A place, at the end of a window or within one."""
    floor = draw(st.integers(0, 1 << 60))
    high = floor + draw(st.integers(0, 1000))
    since, shed = draw(snapshots()), draw(st.integers(0, 1 << 40))
    if draw(st.booleans()):
        return Place(since, floor, high, shed)
    within = draw(st.integers(0, 1 << 60)), draw(st.sampled_from((0, 7, ALL)))
    return Place(since, floor, high, shed, draw(snapshots()), *within)


@given(places())
def test_a_place_comes_back(place: Place) -> None:
    """A text is read as the place that it was made of, with the same key and history alone."""
    signer = Signer("key", "1-2/3")
    text = signer.sign(place)
    assert text.isascii()
    assert text.isprintable()
    assert signer.read(text) == place
    assert Signer("other", "1-2/3").read(text) is None
    assert Signer("key", "1-2/4").read(text) is None


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_anything_else_is_no_place(text: str) -> None:
    """Whatever a client sends, it is refused and raises nothing."""
    assert Signer("key", "1-2/3").read(text) is None


@pytest.mark.parametrize("data", [b"", b"\1", b"\2" * 40, b"\1" + b"\xff" * 40, b"\1\0\0\0\0\0\0"])
def test_signed_nonsense_is_no_place(data: bytes) -> None:
    """Nor is what has our signature, and is not what this version writes."""
    signer = Signer("key", "1-2/3")
    signed = data + signer._signature(data)
    assert signer.read(base64.urlsafe_b64encode(signed).rstrip(b"=").decode()) is None


def test_too_many_transactions_at_once() -> None:
    """A place whose text would be longer than headers may be has one that leads nowhere."""
    running = tuple(range(100, 8000, 2))
    place = Place(Snapshot(100, 9000, running), 0, 0, 0)
    signer = Signer("key", "1-2/3")
    assert signer.sign(place) == NOWHERE
    assert signer.read(NOWHERE) is None
    few = Place(Snapshot(100, 9000, running[:1000]), 0, 0, 0)
    assert len(signer.sign(few)) < LONGEST // 2


@given(snapshots(), snapshots())
def test_covers(later: Snapshot, earlier: Snapshot) -> None:
    """One covers the other just when it sees each transaction that the other sees."""
    each = range(earlier.xmin - 1, earlier.xmax + 1)
    sees_all = all(later.sees(txid) for txid in each if earlier.sees(txid))
    if covers(later, earlier):
        assert sees_all
    assert covers(later, later)


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
    place = Place(Snapshot(12, 15, (12,)), 100, 200, 0)
    assert place.lacks(Emptied(emptied, Snapshot.parse(snapshot))) is lacks
