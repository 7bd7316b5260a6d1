"""The gauges of the replication slots by which a Hub reads the write-ahead log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from psycopg2.extensions import cursor as Cursor

from ..consumers.slot_states import SlotState, read_slots
from ..core.metrics import Meter
from ..triggers.names import slot_name


class SlotGauges:
    """Measures the slots of ``consumers`` whenever ``look`` is called."""

    def __init__(self, meter: Meter, consumers: Sequence[str]) -> None:
        self._meter = meter
        self._consumers = consumers
        self._slots: dict[str, SlotState | None] = {}

    def look(self, cursor: Cursor) -> None:
        """Look at the slots. The gauges are there from the first look on."""
        cursor.execute("SELECT pg_catalog.current_database()")
        [(database,)] = cursor.fetchall()
        slots, known = read_slots(cursor), bool(self._slots)
        self._slots = {each: slots.get(slot_name(database, each)) for each in self._consumers}
        if not known:
            for each in self._consumers:
                retained, safe = partial(self._retained, each), partial(self._safe, each)
                self._meter.gauge("slot_retained_bytes", retained, consumer=each)
                self._meter.gauge("slot_safe_bytes", safe, consumer=each)

    def _retained(self, consumer: str) -> float:
        slot = self._slots[consumer]
        return 0.0 if slot is None else float(slot.retained_bytes)

    def _safe(self, consumer: str) -> float:
        """Infinity where the server sets no bound; 0 for a slot that is lost."""
        slot = self._slots[consumer]
        if slot is None or slot.invalidation:
            return 0.0
        return math.inf if slot.safe_bytes is None else float(max(0, slot.safe_bytes))
