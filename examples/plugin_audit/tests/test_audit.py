"""The audit trail keeps what every broadcaster has to keep, and some more."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from pgsignals_audit import AuditBroadcaster
from pgsignals_audit.plugin import pgsignals_broadcaster

import pgsignals
from pgsignals.testing.conformance import BroadcasterConformance, Written, make_event


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


class TestConformance(BroadcasterConformance):
    """It is a broadcaster: the tests are inherited."""

    @pytest.fixture
    def broadcaster(self, path: Path) -> AuditBroadcaster:
        return AuditBroadcaster(path)

    @pytest.fixture
    def written(self, path: Path) -> Callable[[int], Sequence[Written]]:
        def read(count: int) -> Sequence[Written]:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert len(lines) == count
            return [(line, json.dumps(line.pop("data")).encode()) for line in lines]

        return read


def test_what_fails_is_kept_for_the_next_time(path: Path) -> None:
    """After an error nothing is lost, and nothing is there twice."""
    audit = AuditBroadcaster(path)
    path.mkdir()
    audit.publish([make_event(1)])
    with pytest.raises(pgsignals.BrokerError, match=r"audit\.jsonl"):
        audit.flush(1.0)
    path.rmdir()
    audit.publish([make_event(1), make_event(2)])
    assert audit.flush(1.0)
    ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert ids == [make_event(1).uid, make_event(2).uid]


def test_urls() -> None:
    """It takes its own URLs, refuses those without a file, and leaves the others alone."""
    assert str(pgsignals_broadcaster("audit:///tmp/a")) == "audit:///tmp/a"
    assert pgsignals_broadcaster("kafka://localhost") is None
    with pytest.raises(pgsignals.ConfigurationError, match="wants a file"):
        pgsignals_broadcaster("audit://host/tmp/a")
