"""Integrations, each of which needs the package that it is named for. The core imports none."""
