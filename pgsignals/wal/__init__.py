"""PostgreSQL's write-ahead log as a log that durable delivery reads."""
