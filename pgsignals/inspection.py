"""The state of a Hub and of its database."""

# A public path, which stays; the code is in the package.
from .dispatch.backend_status import BackendStatus as BackendStatus
from .hub.status import Health as Health
from .hub.status import Status as Status
from .triggers.inspection import ForeignTable as ForeignTable
