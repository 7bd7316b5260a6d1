"""The announcement of what a broker has lost before it was read, for plugins."""

# A public path, which stays; the code is in the package.
from ..plugins.missed import *  # noqa: F403
