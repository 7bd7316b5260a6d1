"""``python -m tests.durability``: the checker, for as long as one wants."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .campaign import FAULTS, MOVE, OUTAGE_SECONDS, PROMOTION, SLOT_FAULTS, Campaign, Outcome
from .changes import CHANGES
from .destination import DESTINATIONS
from .mutants import MUTANTS


def main() -> int:
    """Run the rounds; 0 if all held."""
    parser = argparse.ArgumentParser(prog="python -m tests.durability", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="how many (10)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of writing in each (4)")
    parser.add_argument("--writers", type=int, default=8, help="threads that write (8)")
    parser.add_argument("--seed", type=int, default=None, help="of what is injected and written")
    parser.add_argument("--peace", action="store_true", help="inject nothing")
    parser.add_argument(
        "--only",
        action="append",
        choices=(*FAULTS, *CHANGES, *SLOT_FAULTS, PROMOTION, MOVE),
        help="inject these faults alone",
    )
    parser.add_argument("--postgres", type=int, help="the server's major version")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), default="", help="must be found out")
    parser.add_argument("--delivery", choices=("outbox", "wal", "both"), default="outbox")
    parser.add_argument("--to", choices=sorted(DESTINATIONS), default="", help="relay to a broker")
    parser.add_argument(
        "--outage", type=float, default=OUTAGE_SECONDS, help="of the broker at most, in s (5)"
    )
    parser.add_argument("--folder", type=Path, help="for the ledger and the consumers' log")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time())
    folder = options.folder or Path(tempfile.mkdtemp(prefix="pgsignals-durability-"))
    folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(
        folder,
        seed,
        seconds=options.seconds,
        writers=options.writers,
        faults=() if options.peace else options.only,
        version=options.postgres,
        mutant=options.mutant,
        to=options.to,
        outage=options.outage,
        delivery=options.delivery,
    )
    _say(f"seed {seed}; the ledger and the consumers' log are in {folder}")
    with campaign.open():
        for number in range(options.rounds):
            began = time.monotonic()
            found = campaign.run_round()
            outcome = campaign.outcome
            _say(
                f"round {number + 1}: {outcome.committed} committed, {outcome.delivered} delivered,"
                f" {outcome.redelivered} again, {outcome.announced} announced,"
                f" {time.monotonic() - began:.1f} s: " + ("; ".join(found) if found else "holds")
            )
            if found:
                break
    _say(report(campaign.outcome))
    return 1 if campaign.outcome.problems else 0


def report(outcome: Outcome) -> str:
    """What was done, and what came of it."""
    lines = [
        f"{outcome.rounds} rounds: {outcome.committed} versions committed; over all consumers "
        f"{outcome.delivered} delivered, {outcome.redelivered} of them again "
        f"({outcome.unmarked} without being said to be so), "
        f"{outcome.announced} not delivered and announced by a Gap"
    ]
    for title, counts in (
        ("injected", outcome.injected),
        ("said by consumers", outcome.remarks),
        ("transactions", outcome.transactions),
    ):
        lines.append(f"{title}:")
        lines += [f"  {count:7} {what}" for what, count in sorted(counts.items())]
    lines += outcome.problems or ["nothing was wrong"]
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
