"""Backfills: existing rows as events, for one consumer."""
