"""The log that is a table: its schema, positions, housekeeping and administration."""
