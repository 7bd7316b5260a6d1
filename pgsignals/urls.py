"""The URLs of brokers, from which broadcasters and sources are made, and their options."""

# A public path, which stays; the code is in the package.
from .plugins.urls import *  # noqa: F403
