"""Where events go: the protocol of broadcasters, and the one that is always there."""

# A public path, which stays; the code is in the package.
from ..plugins.broadcaster import *  # noqa: F403
