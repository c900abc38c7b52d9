"""Owns: what this machine and process have: AF_VSOCK loopback, descriptors; the usual CID."""

import errno
import os
import socket

CID = 16

SOON = 10.0
"""Seconds. What is to happen at once has happened by then, on however busy a machine; each deadline
that it could be mistaken for is later. How quick something is when nothing is in its way, the least
of several times shows."""


def has_loopback():
    """Whether CID 1 answers here: nobody listens, so an answer is a reset."""
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
            probe.settimeout(2)
            return probe.connect_ex((1, 9)) == errno.ECONNRESET
    except OSError:
        return False


HAS_LOOPBACK = has_loopback()


def open_descriptors():
    """Return {fd: what it is} of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own descriptor
    return found
