"""Owns: the guest's network.

Must not know: when a session begins and ends, how descriptors are waited for.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import suppress
from typing import Final

from nitro_vsock.core import FlowState
from nitro_vsock.errors import InvalidArgumentError, ProxyError, require_int
from nitro_vsock.protocol import VsockPortOffset
from nitro_vsock.session.services.receiving import GONE, receive
from nitro_vsock.transport import READABLE, EventLoop, PathLike, Relay, UnixAddress, wrap_socket
from nitro_vsock.wire import DEFAULT_GUEST, Guest, NetworkProxy

MIN_FRAME: Final = 14 + 68

MAX_FRAME: Final = 14 + 65535
"""What a guest may say its largest Ethernet frame is: 14 bytes of header and an MTU of 68 (RFC 791)
to 65535, the most a tap device takes (`linux/if_tun.h`)."""

_FRAME: Final = struct.Struct(">I")
_NATIVE: Final = struct.Struct("=I")
_ETHERNET: Final = 14
"""Bytes of a frame's header, which an MTU does not count."""


class NetProxy:
    """The guest's network: its Ethernet frames to and from passt, gvproxy or their like.

    The backend is a Unix stream socket with a big-endian u32 length before each frame, as QEMU's
    `-netdev stream` speaks it. Its bytes pass unchanged; those of the guest in whole frames.
    """

    port_offset = VsockPortOffset.NET

    def __init__(self, backend: PathLike | int | socket.socket) -> None:
        """Nothing is opened yet.

        Args:
            backend: a path to connect to when a session begins; or an inherited, connected
                descriptor or socket, duplicated then, which serves one session.

        Raises:
            InvalidArgumentError: it is none of these.
        """
        if isinstance(backend, (str, bytes, os.PathLike)):
            UnixAddress(os.fsdecode(backend))
        elif not isinstance(backend, socket.socket):
            require_int("backend", backend, 0, (1 << 31) - 1, "or a path or a socket")
        self._backend = backend

    def arg(self) -> NetworkProxy:
        """Return the frame that makes the guest connect."""
        return NetworkProxy()

    def open(self) -> NetService:
        """Connect to the backend, or duplicate the descriptor.

        Raises:
            ProxyError: nobody listens at the path.
            InvalidArgumentError: the descriptor is no connected Unix stream socket.
        """
        if isinstance(self._backend, (str, bytes, os.PathLike)):
            return NetService(_connect(self._backend))
        fd = self._backend if isinstance(self._backend, int) else self._backend.fileno()
        return NetService(_adopt(fd))


def _connect(path: PathLike) -> socket.socket:
    backend = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        backend.setblocking(False)  # a full backlog is an error, not a wait
        backend.connect(os.fspath(path))
    except OSError as error:
        backend.close()
        raise ProxyError(
            f"the network backend cannot be reached: {os.fsdecode(path)}: {error.strerror}",
            errno=error.errno,
        ) from error
    return backend


def _adopt(fd: int) -> socket.socket:
    limit = "must be a connected Unix stream socket"
    try:
        backend = wrap_socket(os.dup(fd))
    except OSError as error:
        raise InvalidArgumentError("backend", fd, f"{limit} ({error.strerror})") from None
    try:
        if (backend.family, backend.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise InvalidArgumentError("backend", fd, limit)
        backend.getpeername()
    except InvalidArgumentError:
        backend.close()
        raise
    except OSError as error:
        backend.close()
        raise InvalidArgumentError("backend", fd, f"{limit} ({error.strerror})") from None
    return backend


def _frame_bytes(header: bytes, guest: Guest) -> int:
    """Return the largest frame that a guest means with the first bytes of its network stream.

    Newer guests say MTU + 14, big-endian; older ones the MTU, in their own byte order. Only one of
    the two makes sense, but for 65,536: the MTU 256 of an older guest, or 65,522 of a newer one.
    There the profile decides.
    """
    frame = int(_FRAME.unpack(header)[0])
    mtu = int(_NATIVE.unpack(header)[0])
    is_native = MIN_FRAME <= mtu + _ETHERNET <= MAX_FRAME
    if is_native and (guest.native_mtu or not MIN_FRAME <= frame <= MAX_FRAME):
        return mtu + _ETHERNET
    return frame


class NetService:
    """The network of one session."""

    finished = True

    def __init__(self, backend: socket.socket) -> None:
        """Take the backend; it is closed with this, and as blocking as it came."""
        self.frame_bytes = 0
        """The guest's MTU + 14; 0 until it said so."""
        self.guest = DEFAULT_GUEST
        """What the session expects the guest to be."""
        self._backend = backend
        self._blocking = os.get_blocking(backend.fileno())
        self._needed = True
        self._header = b""
        self._relay: Relay | None = None
        self._connection: socket.socket | None = None

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes to the backend, and to the guest."""
        if self._relay is None:
            return 0, 0
        return self._relay.there.moved, self._relay.back.moved

    def connected(self, connection: socket.socket, loop: EventLoop) -> None:
        """Wait for the frame size, then relay."""
        self._connection, self._loop = connection, loop
        loop.watch(connection.fileno(), READABLE, self._receive)

    def _receive(self, _events: int) -> None:
        assert self._connection is not None  # noqa: S101 - watched only once connected
        got = receive(self._connection, _FRAME.size - len(self._header))
        if got is None:
            return
        self._header += got
        if got and len(self._header) < _FRAME.size:
            return
        self._loop.unwatch(self._connection.fileno())
        if len(self._header) < _FRAME.size:
            raise ProxyError(
                "the guest closed its network connection before it said its MTU",
                errno=errno.ECONNRESET,
            )
        self.frame_bytes = _frame_bytes(self._header, self.guest)
        if not MIN_FRAME <= self.frame_bytes <= MAX_FRAME:
            raise ProxyError(
                f"the guest's largest frame must be {MIN_FRAME} to {MAX_FRAME} bytes, "
                f"it says {self.frame_bytes}",
                errno=errno.EBADMSG,
            )
        # passt of Debian 12 (2023-03) loses its place where a frame reaches it in pieces, and the
        # guest sends its length by itself.
        self._relay = self._loop.relay(
            self._connection, self._backend, self._look, whole_frames=self.frame_bytes
        )

    def program_ended(self) -> None:
        """From now on the backend may end too."""
        self._needed = False

    def _look(self, relay: Relay) -> None:
        """The guest may end; a backend that does leaves it without a network."""
        there, back = relay.there, relay.back
        relay.close()
        if not self._needed or there.state is FlowState.ENDED:
            return
        for flow, failed in ((there, FlowState.FROM_FAILED), (back, FlowState.TO_FAILED)):
            if flow.state is failed and flow.error in GONE:
                return
            if flow.state is failed:
                raise _failed("the guest's network connection", flow.error)
        code = back.error or there.error or errno.ECONNRESET
        raise _failed("the connection to the network backend", code)

    def close(self) -> None:
        """Close our end of the backend."""
        if self._relay is not None:
            self._relay.close()
        if self._backend.fileno() >= 0:
            with suppress(OSError):
                os.set_blocking(self._backend.fileno(), self._blocking)
        self._backend.close()


def _failed(what: str, code: int) -> ProxyError:
    return ProxyError(f"{what} broke off: {os.strerror(code)}", errno=code)
