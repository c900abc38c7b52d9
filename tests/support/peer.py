"""Owns: a guest of its own: an independent parser of the launch protocol over plain sockets.

Must not know: anything of nitro_vsock; it reads each id, length and count with one read, as the
deployed guest does, and fails where that read is short.
"""

import contextlib
import fcntl
import hashlib
import os
import socket
import struct
import sys
import termios
import threading
import time
from dataclasses import dataclass, field

READY = b"\xb7"
U64 = struct.Struct("<Q" if sys.byteorder == "little" else ">Q")
U32 = struct.Struct("=I")
CHUNK = 1 << 20


class GuestError(Exception):
    """The guest would have failed here."""


@dataclass
class Taken:
    """What the guest got."""

    path: bytes = b""
    argv: list[bytes] = field(default_factory=list)
    envp: list[bytes] = field(default_factory=list)
    rootfs_bytes: int = 0
    rootfs_sha256: str = ""
    network: bool = False
    output: bool = False
    order: list[int] = field(default_factory=list)
    received: int = 0


def connect(address, *, timeout=10.0):
    """Connect to a Unix path or an AF_VSOCK (cid, port) as soon as somebody listens there."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_VSOCK
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def handshake(sock):
    """Say ready, expect it back."""
    sock.sendall(READY)
    if sock.recv(1) != READY:
        raise GuestError("no ready byte from the host")


class Parser:
    """Reads frames from a connected socket until Finished."""

    def __init__(self, sock, *, before_read=None, sink=None):
        """`before_read(bytes_received)` runs before every read: to stall, or to die by raising.

        `sink` is called with each piece of the archive.
        """
        self.sock = sock
        self.sink = sink or (lambda piece: None)
        self.before_read = before_read or (lambda received: None)
        self.taken = Taken()

    def one_read(self, size):
        """Return what one read gives, at most `size` bytes."""
        self.before_read(self.taken.received)
        data = self.sock.recv(size)
        self.taken.received += len(data)
        return data

    def number(self):
        """Return a length or count; one read or failure."""
        data = self.one_read(U64.size)
        if len(data) != U64.size:
            raise GuestError(f"short read of a length: {len(data)} bytes")
        return U64.unpack(data)[0]

    def payload(self, size):
        """Yield `size` bytes in pieces."""
        while size:
            piece = self.one_read(min(size, CHUNK))
            if not piece:
                raise GuestError(f"end of stream {size} bytes before the end of a payload")
            size -= len(piece)
            yield piece

    def string(self):
        """Return a string without its NUL."""
        data = b"".join(self.payload(self.number()))
        if not data.endswith(b"\0"):
            raise GuestError("string without NUL")
        return data[:-1]

    def run(self):
        """Parse everything."""
        taken = self.taken
        while True:
            frame = self.one_read(1)
            if not frame:
                raise GuestError("end of stream where an id was due")
            taken.order.append(frame[0])
            if frame[0] == 0:
                taken.rootfs_bytes = self.number()
                digest = hashlib.sha256()
                for piece in self.payload(taken.rootfs_bytes):
                    digest.update(piece)
                    self.sink(piece)
                taken.rootfs_sha256 = digest.hexdigest()
            elif frame[0] == 1:
                taken.path = self.string()
            elif frame[0] == 2:
                taken.argv = [self.string() for _ in range(self.number())]
            elif frame[0] == 3:
                taken.envp = [self.string() for _ in range(self.number())]
            elif frame[0] == 4:
                taken.network = True
            elif frame[0] == 5:
                taken.output = True
            elif frame[0] == 255:
                return taken
            else:
                raise GuestError(f"unknown id {frame[0]}")


class Guest(threading.Thread):
    """A guest in a thread: connects, handshakes, parses, closes."""

    def __init__(self, address, *, before_read=None, sink=None, hold_open=False):
        """`hold_open` keeps the connection after Finished until `close` is called."""
        super().__init__(daemon=True)
        self._address = address
        self._before_read = before_read
        self._sink = sink
        self._hold = threading.Event()
        if not hold_open:
            self._hold.set()
        self._error = None
        self._parser = None
        self.start()

    def run(self):
        """Be the guest."""
        try:
            with connect(self._address) as sock:
                sock.settimeout(60)
                self._parser = Parser(sock, before_read=self._before_read, sink=self._sink)
                handshake(sock)
                self._parser.run()
                self._hold.wait(60)
        except BaseException as error:
            self._error = error

    def close(self):
        """Let a held connection go."""
        self._hold.set()

    def result(self):
        """Wait for the end; return what was taken, or raise what went wrong."""
        self.close()
        self.join(60)
        assert not self.is_alive(), "the guest hangs"
        if self._error is not None:
            raise self._error
        return self._parser.taken

    def failure(self):
        """Wait for the end; return what went wrong, or None."""
        with contextlib.suppress(BaseException):
            self.result()
        return self._error


def unread(sock):
    """Return what the other end of a Unix socket has not read yet, as memory: 0 for nothing."""
    return U32.unpack(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(U32.size)))[0]


def wait_until(condition, *, timeout=10.0, what="condition"):
    """Poll a condition of another process or thread that offers nothing to wait on."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true in {timeout} s")
        os.sched_yield()
