"""The database side: names, SQL and installation of the triggers."""
