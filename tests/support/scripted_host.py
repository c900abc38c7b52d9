"""Owns: a host for a whole enclave's life over plain Unix sockets, driven step by step by a test.

Must not know: anything of nitro_vsock.
"""

import socket
import struct

from host import launch
from peer import READY

ARGS, NET, OUTPUT, RETURN_CODE, SIGNAL = 1, 2, 3, 4, 5
TIMEOUT = 20.0


class ScriptedHost:
    """Listens on every port at once. A context manager."""

    def __init__(self, uds, cid, ports=(ARGS, NET, OUTPUT, RETURN_CODE, SIGNAL)):
        """Bind; `ports` are offsets."""
        self._listeners = {}
        self._open = []
        for port in ports:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._open.append(sock)
            sock.bind(f"{uds}_{cid + port}")
            sock.listen(8)
            sock.settimeout(TIMEOUT)
            self._listeners[port] = sock

    def accept(self, port):
        """Return the next connection to a port."""
        sock, _ = self._listeners[port].accept()
        sock.settimeout(TIMEOUT)
        self._open.append(sock)
        return sock

    def waiting(self):
        """Return the ports that have a connection nobody has accepted."""
        found = set()
        for port, sock in self._listeners.items():
            sock.settimeout(0)
            try:
                self._open.append(sock.accept()[0])
                found.add(port)
            except BlockingIOError:
                pass
            sock.settimeout(TIMEOUT)
        return found

    def hand_over(self, archive, argv, envp=(b"PATH=/bin",), *, flags=b""):
        """Send a launch, and wait for the guest to close."""
        sock = self.accept(ARGS)
        assert sock.recv(1) == READY
        sock.sendall(READY + launch(archive, path=argv[0], argv=argv, envp=envp, flags=flags))
        assert sock.recv(1) == b""
        sock.close()

    def status(self, *, answer=True):
        """Take the return code; answer it, and see the guest go down."""
        sock = self.accept(RETURN_CODE)
        (status,) = struct.unpack("=i", exactly(sock, 4))
        if answer:
            sock.sendall(b"\0\0\0\0")
            assert sock.recv(1) == b""
        return status

    def close(self):
        """Close everything."""
        for sock in self._open:
            sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def exactly(sock, size):
    """Return so many bytes, or fewer at the end."""
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            break
        data += piece
    return data


def until_end(sock):
    """Return everything up to the end, which may be a reset."""
    data = b""
    try:
        while piece := sock.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data
