"""The protocols of metrics and traces, by which a Hub is observed."""

# A public path, which stays; the code is in the package.
from .core.metrics import *  # noqa: F403
