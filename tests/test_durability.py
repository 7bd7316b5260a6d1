"""The durability checker: a short run, and proof that it finds out what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from durability.campaign import Campaign


@pytest.mark.timeout(300)
def test_nothing_is_lost(tmp_path: Path) -> None:
    """Through crashes, stops and restarts, all that is committed is delivered, in order."""
    campaign = Campaign(tmp_path, seed=11, seconds=2.5)
    with campaign.open():
        for _ in range(4):
            assert campaign.run_round() == [], (tmp_path / "log").read_text()[-5000:]
    assert campaign.outcome.committed > 0
    assert sum(campaign.outcome.injected.values()) > 0
