"""Pauses between tries."""

# A public path, which stays; the code is in the package.
from .core.backoff import *  # noqa: F403
