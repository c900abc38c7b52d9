"""Owns: a scripted host: listens on a Unix path and sends the bytes it is given, in given pieces.

Must not know: anything of nitro_vsock.
"""

import contextlib
import os
import socket
import struct
import threading

from peer import READY, unread, wait_until


def u64(number):
    """Return a length or count as the wire has it."""
    return struct.pack("=Q", number)


def string(data):
    """Return a string's length, bytes and NUL."""
    return u64(len(data) + 1) + data + b"\0"


def strings(frame, items):
    """Return an ExecArgv (2) or ExecEnvp (3) frame."""
    return bytes([frame]) + u64(len(items)) + b"".join(map(string, items))


def rootfs(data):
    """Return a RootFilesystem frame with its archive."""
    return b"\0" + u64(len(data)) + data


def launch(archive, *, path=b"/bin/app", argv=(b"/bin/app",), envp=(b"A=1",), flags=b""):
    """Return a whole stream."""
    arguments = b"\1" + string(path) + strings(2, argv) + strings(3, envp)
    return flags + arguments + rootfs(archive) + b"\xff"


class Host(threading.Thread):
    """A host in a thread: takes one connection, handshakes, sends, closes. A context manager."""

    def __init__(self, path, pieces=(), *, answer=READY, hold=False, listen_to_ready=True):
        """`pieces` go out one by one, each after the one before was read.

        Args:
            path: where to listen.
            pieces: what to send after the handshake.
            answer: to the ready byte; b"" closes instead, None says nothing.
            hold: keep the connection after the last piece until the context is left.
            listen_to_ready: False leaves the ready byte unread, so that closing is a reset.
        """
        super().__init__(daemon=True)
        self._pieces = list(pieces)
        self._answer = answer
        self._listen_to_ready = listen_to_ready
        self._let_go = threading.Event()
        if not hold:
            self._let_go.set()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(path)
        self._socket.listen(1)
        self._socket.settimeout(20)
        self.shaken = threading.Event()
        """Set once the ready byte was read."""
        self.drained = threading.Event()
        """Set once every piece was read."""
        self.start()

    def run(self):
        """Be the host."""
        with contextlib.suppress(OSError), self._socket.accept()[0] as connection:
            connection.settimeout(20)
            if self._listen_to_ready:
                connection.recv(1)
            self.shaken.set()
            if self._answer == b"":
                return
            if self._answer is not None:
                connection.sendall(self._answer)
                self._send(connection)
            self._let_go.wait(20)

    def _send(self, connection):
        for piece in self._pieces:
            connection.sendall(piece)
            wait_until(lambda: unread(connection) == 0, what="the reading")
        self.drained.set()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._let_go.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.join(20)
        self._socket.close()
        os.unlink(self._path)
        assert not self.is_alive(), "the host hangs"
