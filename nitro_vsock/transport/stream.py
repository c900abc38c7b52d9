"""Owns: connected sockets, and how payload is moved into them.

Must not know: the launch protocol.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
from dataclasses import dataclass
from enum import Enum
from typing import Final

from nitro_vsock.core import MMAP, READ, SENDFILE, SPLICE, Guard, sockets, streams
from nitro_vsock.errors import NitroVsockError
from nitro_vsock.progress import Meter
from nitro_vsock.transport.addresses import Address, Peer, VsockAddress
from nitro_vsock.transport.holder import Holder
from nitro_vsock.transport.wakeup import WakeUp, close_fd

SEND_BUFFER: Final = 4 << 20
"""Bytes asked of SO_SNDBUF on Unix sockets; sendfile into the default is three times slower."""

WAIT_IN_KERNEL: Final = 10_000
"""Microseconds that a send on AF_VSOCK may wait for room. Credit comes in small lumps there, and to
poll for each is dear. Unix sockets gain nothing by it."""


class Strategy(str, Enum):
    """How payload gets from its source into the socket."""

    AUTO = "auto"
    SENDFILE = "sendfile"
    """Regular files: the kernel moves pages, nothing is copied through this process."""
    SPLICE = "splice"
    """Pipes: the same. Not on AF_VSOCK before Linux 6.5."""
    MMAP = "mmap"
    """Regular files through a mapping: O_DIRECT descriptors, and AF_VSOCK before Linux 6.5, where
    sendfile makes a packet of each page."""
    READ = "read"
    """Anything readable, through a 1 MiB buffer; pipes to AF_VSOCK before Linux 6.5; and where the
    kernel refuses the first choice."""
    SEND = "send"
    """Payload that is in memory already."""

    def __str__(self) -> str:
        return self.value


_CODES: Final = {
    Strategy.SENDFILE: SENDFILE,
    Strategy.SPLICE: SPLICE,
    Strategy.MMAP: MMAP,
    Strategy.READ: READ,
}

_STRATEGIES: Final = {code: strategy for strategy, code in _CODES.items()}


@dataclass(frozen=True)
class FilePayload:
    """A run of bytes behind a descriptor that somebody else owns.

    Attributes:
        fd: the descriptor.
        offset: where the run begins; 0 where the descriptor cannot seek.
        length: bytes.
        mode: `st_mode` of the descriptor.
        seekable: whether reads can name their offset.
    """

    fd: int
    offset: int
    length: int
    mode: int
    seekable: bool


def _kernel() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def choose_strategy(
    family: int, payload: FilePayload, kernel: tuple[int, int] | None = None
) -> Strategy:
    """Return the fastest way for a payload into a socket of this family.

    Args:
        family: socket.AF_VSOCK or socket.AF_UNIX.
        payload: what is to be sent.
        kernel: (major, minor); the running one by default.
    """
    page_by_page = family == socket.AF_VSOCK and (kernel or _kernel()) < (6, 5)
    if stat.S_ISFIFO(payload.mode):
        return Strategy.READ if page_by_page else Strategy.SPLICE
    if not stat.S_ISREG(payload.mode):
        return Strategy.READ
    if fcntl.fcntl(payload.fd, fcntl.F_GETFL) & os.O_DIRECT:
        return Strategy.MMAP
    if page_by_page:
        return Strategy.MMAP
    return Strategy.SENDFILE


class Stream(Holder):
    """A connected socket."""

    def __init__(self, fd: int, family: int, peer: Peer, wake_up: WakeUp) -> None:
        """Take ownership of a connected, non-blocking descriptor."""
        self._fd = fd
        super().__init__(wake_up)
        self.family = family
        self.peer = peer
        if family == socket.AF_VSOCK:
            sockets.block_briefly(fd, WAIT_IN_KERNEL)

    def fileno(self) -> int:
        """The descriptor, -1 once closed."""
        return self._fd

    def send(self, data: bytes | memoryview, guard: Guard, meter: Meter) -> None:
        """Send all of a buffer. Raises what the errno table says for the meter's stage."""
        with self._in_use():
            streams.send(self._fd, data, guard, meter)

    def send_from(
        self, payload: FilePayload, strategy: Strategy, guard: Guard, meter: Meter
    ) -> Strategy:
        """Send a payload; return the strategy in use at the end.

        Raises what the errno table says for the meter's stage.
        """
        with self._in_use():
            if strategy is Strategy.AUTO:
                strategy = choose_strategy(self.family, payload)
            code = streams.send_from(
                self._fd,
                payload.fd,
                payload.offset,
                payload.length,
                _CODES[strategy],
                guard,
                meter,
                seekable=payload.seekable,
            )
            return _STRATEGIES[code]

    def expect(self, length: int) -> None:
        """Prepare for so many bytes of payload to send: enlarge the buffer where it pays."""
        with self._in_use():
            if self.family == socket.AF_UNIX and length > SEND_BUFFER // 64:
                sockets.enlarge_sndbuf(self._fd, SEND_BUFFER)

    def handshake(self, ready: int, guard: Guard) -> None:
        """Exchange the ready byte as the side that connected."""
        with self._in_use():
            sockets.handshake(self._fd, ready, guard)

    def receive(self, view: memoryview, guard: Guard, meter: Meter) -> int:
        """Receive once into a writable buffer; return the count, 0 at end of stream."""
        with self._in_use():
            return streams.receive(self._fd, view, guard, meter)

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        close_fd(fd)

    def __repr__(self) -> str:
        return f"<Stream {self.peer} fd={self._fd}>"


def connect(address: Address, guard: Guard, wake_up: WakeUp) -> Stream:
    """Connect to an address. Raises what the errno table says for stage connect."""
    try:
        if isinstance(address, VsockAddress):
            fd = sockets.connect_vsock(address.cid, address.port, guard)
            return Stream(fd, socket.AF_VSOCK, Peer(address.cid, address.port), wake_up)
        fd = sockets.connect_unix(os.fsencode(address.path), guard)
        return Stream(fd, socket.AF_UNIX, Peer(), wake_up)
    except NitroVsockError as error:
        error.explain(str(address))
        raise
