"""Where the bytes of an archive come from, with an exact length, and whether they stood still.

Knows nothing of the socket they go to.
"""

from nitro_vsock.rootfs.opened import OpenRootfs
from nitro_vsock.rootfs.rootfs import Rootfs
from nitro_vsock.rootfs.sink import Sink, open_sink

__all__ = [
    "OpenRootfs",
    "Rootfs",
    "Sink",
    "open_sink",
]
