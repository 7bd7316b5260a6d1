"""One database's signals at a moment: read by one session, which installs and registers nothing."""
