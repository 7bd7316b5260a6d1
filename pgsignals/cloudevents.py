# A public path, which stays; the code is in the package.
from .plugins.cloudevents import *  # noqa: F403
from .plugins.cloudevents import __doc__ as __doc__  # noqa: A004
