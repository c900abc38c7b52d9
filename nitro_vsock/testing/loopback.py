"""Owns: whether AF_VSOCK answers on this machine. Must not know: who asks."""

from __future__ import annotations

import socket
from typing import Final

from nitro_vsock.protocol import VMADDR_CID_ANY, VMADDR_CID_LOCAL

PORT_ANY: Final = 0xFFFFFFFF

PROBE_TIMEOUT: Final = 0.5
"""Seconds. Loopback answers at once or, where another transport hears the call, never."""

RESERVED_PORT: Final = 1
"""Of no launch: the lowest CID is 3, its lowest port 4."""


def has_vsock() -> bool:
    """Return whether this kernel makes AF_VSOCK sockets."""
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def loopback_problem() -> str | None:
    """Return why a connection to CID 1 does not arrive; None where it does."""
    try:
        with (
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener,
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client,
        ):
            listener.bind((VMADDR_CID_ANY, PORT_ANY))
            listener.listen(1)
            client.settimeout(PROBE_TIMEOUT)
            client.connect((VMADDR_CID_LOCAL, listener.getsockname()[1]))
    except OSError as error:
        return error.strerror or str(error)
    return None
