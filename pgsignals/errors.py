# A public path, which stays; the code is in the package.
from .core.errors import *  # noqa: F403
from .core.errors import __doc__ as __doc__  # noqa: A004
