"""Descriptors and who owns them: addresses, listeners, streams, and waiting for many.

Knows nothing of frames.
"""

from nitro_vsock.transport.addresses import Address, PathLike, Peer, UnixAddress, VsockAddress
from nitro_vsock.transport.holder import FD_MAX, Holder
from nitro_vsock.transport.listener import Listener
from nitro_vsock.transport.loop import READABLE, WRITABLE, EventLoop, Relay
from nitro_vsock.transport.sockets import wrap_socket
from nitro_vsock.transport.stream import (
    SEND_BUFFER,
    FilePayload,
    Strategy,
    Stream,
    choose_strategy,
    connect,
)
from nitro_vsock.transport.wakeup import WakeUp

__all__ = [
    "Address",
    "EventLoop",
    "FD_MAX",
    "FilePayload",
    "Holder",
    "Listener",
    "PathLike",
    "Peer",
    "READABLE",
    "Relay",
    "SEND_BUFFER",
    "Strategy",
    "Stream",
    "UnixAddress",
    "VsockAddress",
    "WRITABLE",
    "WakeUp",
    "choose_strategy",
    "connect",
    "wrap_socket",
]
