"""Owns: how a service receives from the guest. Must not know: what."""

from __future__ import annotations

import errno
import socket
import struct
from typing import Final

CHUNK: Final = 256 << 10
"""Bytes of output received at once."""

INT: Final = struct.Struct("=i")

GONE: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN})


def receive_into(connection: socket.socket, room: memoryview) -> int | None:
    """Receive once: how much, 0 where the guest has ended, however; None where nothing is there."""
    try:
        return connection.recv_into(room)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in GONE:
            raise
        return 0


def receive(connection: socket.socket, most: int) -> bytes | None:
    """Do the same for a few bytes; return them."""
    room = bytearray(most)
    count = receive_into(connection, memoryview(room))
    return None if count is None else bytes(room[:count])
