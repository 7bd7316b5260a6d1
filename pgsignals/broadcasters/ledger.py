"""A ledger of what a broadcaster has sent, for plugins: under way, acknowledged, or refused."""

# A public path, which stays; the code is in the package.
from ..plugins.ledger import *  # noqa: F403
