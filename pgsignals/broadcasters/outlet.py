"""The status of a broker that events are passed on to."""

# A public path, which stays; the code is in the package.
from ..dispatch.backend_status import BackendStatus as BackendStatus
