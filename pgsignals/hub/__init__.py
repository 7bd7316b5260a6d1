"""The Hub and its deliveries, from start to stop."""
