"""The hooks that plugins may implement (entry-point group ``pgsignals``)."""

# A public path, which stays; the code is in the package.
from .plugins.hookspecs import *  # noqa: F403
