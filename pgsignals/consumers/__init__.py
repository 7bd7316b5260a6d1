"""At least once, over any log: claims, acknowledgements, dead letters, parking and backfills."""
