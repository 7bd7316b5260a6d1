"""A small typed application: what its receivers get is known without being said."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import assert_type

import pgsignals
from pgsignals import Batch, Event, Gap, Hub, Stream, Subscription, Watcher

WATCHERS: Sequence[Watcher | str] = [
    pgsignals.watch("users", "updated", columns=["name"], label="renamed"),
    "orders",
]


@pgsignals.on("renamed")
def renamed(event: Event) -> None:
    print(event.old["name"], event.values["name"])


assert_type(renamed(pgsignals.wait_for("renamed")), None)
assert_type(pgsignals.subscribe(lambda event: assert_type(event, Event).id, "orders"), Subscription)
assert_type(pgsignals.stream("orders"), Stream[Event])
assert_type(pgsignals.stream("orders", gaps=True), "Stream[Event | Gap]")


@pgsignals.on_batch("orders", every=1)
def reindexed(batch: Batch) -> list[object]:
    return batch.ids


@pgsignals.on_gap
def missed(gap: Gap) -> None:
    print(gap.reason)


def misused(event: int) -> None:
    """A receiver of something else is an error."""


pgsignals.on("orders")(misused)  # type: ignore[type-var]
pgsignals.on_batch("orders")(renamed)  # type: ignore[type-var]
pgsignals.on_gap(renamed)  # type: ignore[type-var]


def main() -> None:
    with pgsignals.start("postgresql://localhost/shop", WATCHERS) as hub:
        assert_type(hub, Hub)
        with hub.stream("orders", "inserted") as events:
            for event in events:
                assert_type(event, Event)
        hub.run()
