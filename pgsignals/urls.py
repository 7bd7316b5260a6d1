"""The URL of a broker, which broadcasters and sources are made from, and its options."""

# A public path, which stays; the code is in the package.
from .plugins.urls import *  # noqa: F403
