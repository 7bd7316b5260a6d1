"""The threads that read events; and the protocols that plugins import from here."""

# A public path, which stays; the code is in the package.
from ..plugins.source import RemoteSink as RemoteSink
from ..plugins.source import RemoteSource as RemoteSource
from ..plugins.source import Wanted as Wanted
