"""Owns: socket objects around descriptors. Must not know: what they carry."""

from __future__ import annotations

import os
import socket


def wrap_socket(fd: int) -> socket.socket:
    """Return a socket object around a descriptor, which closes it. It does not change it.

    Raises:
        OSError: it is no socket; the descriptor is closed.
    """
    try:
        blocking = os.get_blocking(fd)
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise
    if (
        sock.gettimeout() is not None
    ):  # socket.setdefaulttimeout: it would wait, and has changed the flag
        sock.settimeout(None)
        os.set_blocking(fd, blocking)
    return sock
