"""One PostgreSQL server: connection strings, connections, sessions, transactions and rights."""
