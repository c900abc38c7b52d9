"""Every call into the compiled module: types, ticks and EINTR, return code -> exception.

One file for each header in csrc/. Knows nothing of frames, members of an archive or enclaves.
"""

from nitro_vsock.core.archives import TarRun
from nitro_vsock.core.calls import FOREVER_NS, VERDICTS, Guard
from nitro_vsock.core.relays import Flow, FlowState, Pump
from nitro_vsock.core.sockets import Gate, PeerInfo
from nitro_vsock.core.streams import MMAP, READ, SENDFILE, SPLICE
from nitro_vsock.core.trees import (
    CHANGED,
    SHORT,
    Gatherer,
    Gathering,
    Kind,
    Listing,
    Scanner,
    Seen,
    Stop,
)

__all__ = [
    "CHANGED",
    "FOREVER_NS",
    "Flow",
    "FlowState",
    "Gate",
    "Gatherer",
    "Gathering",
    "Guard",
    "Kind",
    "Listing",
    "MMAP",
    "PeerInfo",
    "Pump",
    "READ",
    "SENDFILE",
    "SHORT",
    "SPLICE",
    "Scanner",
    "Seen",
    "Stop",
    "TarRun",
    "VERDICTS",
]
