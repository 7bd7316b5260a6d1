"""What tests of pgsignals, and of applications that use it, are made with."""

from __future__ import annotations

from pgsignals.testing.server import (
    Installation,
    Server,
    ServerFailed,
    ServerNotFound,
    find_installations,
)

__all__ = ["Installation", "Server", "ServerFailed", "ServerNotFound", "find_installations"]
