"""A checker of durable delivery: writers, consumers that suffer, and a verdict by comparison."""
