"""Durable delivery: its schema in the database, cursors, consumers, retries and housekeeping."""
