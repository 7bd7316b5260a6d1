"""The checker of durable delivery, for a short while; and proof that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgsignals.testing import find_installations
from tests.durability.__main__ import report
from tests.durability.campaign import PROMOTION, Campaign, ConsumerPlan
from tests.missing import missing

# Rounds that end well take seconds; a machine that is busy takes its time. Some mutants are found
# in one of six rounds.
pytestmark = pytest.mark.timeout(900)

ALONE = (ConsumerPlan("alone", 1, 1, 1),)


def test_nothing_is_lost_invented_or_turned(tmp_path: Path) -> None:
    """Over crashes, hangs, lost connections and restarts, committed and delivered agree."""
    campaign = Campaign(tmp_path, seed=20)
    with campaign.open():
        for _ in range(6):
            if campaign.run_round():
                break
    outcome = campaign.outcome
    assert not outcome.problems, report(outcome)
    # Otherwise the verdict would say little.
    assert outcome.committed > 1000, report(outcome)
    assert outcome.redelivered, report(outcome)
    assert outcome.remarks["emptied"], report(outcome)
    assert sum(outcome.injected.values()) >= 10, report(outcome)


@pytest.mark.parametrize("version", [15, 18])
def test_nothing_of_the_log_is_lost(tmp_path: Path, version: int) -> None:
    """Nor with delivery from the write-ahead log, whose slots are dropped and moved, too."""
    if version not in {each.version for each in find_installations()}:
        missing(f"PostgreSQL {version} is not installed")
    campaign = Campaign(tmp_path, seed=20, delivery="wal", version=version)
    with campaign.open():
        for _ in range(4):
            if campaign.run_round():
                break
    outcome = campaign.outcome
    assert not outcome.problems, report(outcome)
    assert outcome.committed > 1000, report(outcome)
    # Where slots are dropped and moved, much lies in Gaps.
    assert outcome.delivered > outcome.committed // 2, report(outcome)
    assert sum(outcome.injected.values()) >= 10, report(outcome)
    assert any(fault.startswith("slot") for fault in outcome.injected), report(outcome)


@pytest.mark.parametrize("version", [15, 18])
def test_nothing_is_lost_between_two_logs(tmp_path: Path, version: int) -> None:
    """Consumers that go from one delivery to the other, and are killed, lose nothing at all."""
    if version not in {each.version for each in find_installations()}:
        missing(f"PostgreSQL {version} is not installed")
    faults = ["delivery changed", "kill -9"]
    campaign = Campaign(tmp_path, seed=20, delivery="both", version=version, faults=faults)
    with campaign.open():
        for _ in range(5):
            if campaign.run_round():
                break
    outcome = campaign.outcome
    assert not outcome.problems, report(outcome)
    assert outcome.committed > 1000, report(outcome)
    assert not outcome.announced, report(outcome)
    assert outcome.injected["delivery changed"] >= 5, report(outcome)


@pytest.mark.parametrize("version", [15, 18])
def test_nothing_is_lost_when_standbys_are_promoted(tmp_path: Path, version: int) -> None:
    """Nor where one standby after another takes the server's place, while processes are killed."""
    if version not in {each.version for each in find_installations()}:
        missing(f"PostgreSQL {version} is not installed")
    faults = [PROMOTION, PROMOTION, "kill -9"]
    campaign = Campaign(tmp_path, seed=21, delivery="wal", version=version, faults=faults)
    with campaign.open():
        for _ in range(4):
            if campaign.run_round():
                break
    outcome = campaign.outcome
    assert not outcome.problems, report(outcome)
    assert outcome.committed > 300, report(outcome)
    assert outcome.injected[PROMOTION] >= 2, report(outcome)


@pytest.mark.parametrize(
    ("mutant", "fault", "symptom"),
    [
        ("silent", "slot dropped", "committed, but not delivered"),
        ("slot", "slot advanced", "committed, but not delivered"),
        ("page", "kill -9", "committed, but not delivered"),
        ("lsn", "SIGTERM", "not said to be redelivered"),
        ("unasked", "kill -9", "a Gap, where nothing was lost"),
        ("sure", "kill -9", "not said to be redelivered"),
    ],
)
def test_the_checker_finds_wrong_positions_out(
    tmp_path: Path, mutant: str, fault: str, symptom: str
) -> None:
    """A consumer of the log that takes its slot's word, or acknowledges too much, does not pass."""
    campaign = Campaign(
        tmp_path,
        seed=3,
        faults=[fault],
        mutant=mutant,
        drain=15.0,
        consumers=ALONE,
        # Something is under way whenever it is killed.
        pace=0.002,
        delivery="wal",
    )
    with campaign.open():
        problems: list[str] = []
        for _ in range(40):
            problems += campaign.run_round()
            if any(symptom in each for each in problems):
                break
    assert any(symptom in each for each in problems), report(campaign.outcome)


def test_the_checker_finds_wrong_changes_of_the_delivery_out(tmp_path: Path) -> None:
    """A consumer whose logs overlap does not pass."""
    campaign = Campaign(
        tmp_path,
        seed=3,
        faults=["delivery changed"],
        mutant="both",
        drain=15.0,
        consumers=ALONE,
        delivery="both",
    )
    with campaign.open():
        problems: list[str] = []
        for _ in range(40):
            problems += campaign.run_round()
            if any("came as" in each for each in problems):
                break
    assert any("came as" in each for each in problems), report(campaign.outcome)


@pytest.mark.parametrize("kind", ["kafka", "nats"])
def test_a_broker_gets_all_in_order(tmp_path: Path, kind: str) -> None:
    """What a foreign client reads back at a broker that suffers too is what was committed."""
    campaign = Campaign(tmp_path, seed=11, to=kind)
    with campaign.open():
        for _ in range(3):
            if campaign.run_round():
                break
    outcome = campaign.outcome
    assert not outcome.problems, report(outcome)
    assert outcome.committed > 500, report(outcome)
    assert any(fault.startswith("broker") for fault in outcome.injected), report(outcome)


def test_the_checker_finds_a_trusting_relay_out(tmp_path: Path) -> None:
    """A relay that acknowledges what its broker has not acknowledged does not pass."""
    campaign = Campaign(tmp_path, seed=3, mutant="trusting", drain=5.0, to="nats")
    with campaign.open():
        found = next((found for _ in range(20) if (found := campaign.run_round())), [])
    assert any("relay/nats" in each and "not delivered" in each for each in found), report(
        campaign.outcome
    )


@pytest.mark.parametrize(
    ("mutant", "symptom"),
    [
        ("id", "committed, but not delivered"),
        ("txid", "of the same record"),
        ("running", "committed, but not delivered"),
    ],
)
def test_the_checker_finds_wrong_cursors_out(tmp_path: Path, mutant: str, symptom: str) -> None:
    """Cursors that lose what commits late, or turn a record's history, do not pass."""
    campaign = Campaign(
        tmp_path, seed=3, seconds=2.0, faults=(), mutant=mutant, drain=3.0, consumers=ALONE
    )
    with campaign.open():
        found = campaign.run_round()
    assert any(symptom in problem for problem in found), report(campaign.outcome)


@pytest.mark.parametrize(("mutant", "fault"), [("blind", "ALTER TABLE"), ("unheeding", "REVOKE")])
def test_the_checker_finds_silence_out(tmp_path: Path, mutant: str, fault: str) -> None:
    """A consumer that overlooks a changed table, or what writers could not write, does not pass."""
    campaign = Campaign(
        tmp_path,
        seed=3,
        faults=[fault],
        mutant=mutant,
        drain=5.0,
        # Of a table that was made anew, nothing is ever heard again.
        hear=15.0,
        consumers=ALONE,
    )
    with campaign.open():
        found = next((found for _ in range(20) if (found := campaign.run_round())), [])
    assert any("committed, but not delivered" in each for each in found), report(campaign.outcome)


def test_the_checker_finds_acknowledging_too_early_out(tmp_path: Path) -> None:
    """A consumer that acknowledges what it has read, and then is killed, does not pass."""
    # Of what is lost while rights and tables change, a Gap may tell by chance. With receivers that
    # take their time, something that was read is under way whenever it is killed.
    campaign = Campaign(
        tmp_path,
        seed=3,
        faults=["kill -9"],
        mutant="early",
        drain=15.0,
        consumers=ALONE,
        pace=0.002,
    )
    with campaign.open():
        found = next((found for _ in range(20) if (found := campaign.run_round())), [])
    assert any("committed, but not delivered" in each for each in found), report(campaign.outcome)
