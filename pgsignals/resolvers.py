"""The models that pgsignals knows by itself; plugins add others."""

# A public path, which stays; the code is in the package.
from .triggers.resolvers import *  # noqa: F403
