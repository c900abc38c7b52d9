"""Owns: addresses, and the descriptors behind them: Listener, Stream, WakeUp; how payload is moved.

Must not know: the launch protocol.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Union

from nitro_vsock import _lib
from nitro_vsock.errors import (
    BusyError,
    ClosedError,
    InvalidArgumentError,
    LaunchCancelledError,
    NitroVsockError,
    Stage,
    VsockBindError,
    VsockCidMismatchError,
    from_errno,
)
from nitro_vsock.progress import Meter
from nitro_vsock.protocol import VMADDR_CID_ANY

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_UNIX_PATH: Final = 107
"""Bytes of a Unix socket's path: `sun_path` less its NUL (unix(7))."""

SEND_BUFFER: Final = 4 << 20
"""Bytes asked of SO_SNDBUF on Unix sockets; sendfile into the default is three times slower."""

WAIT_IN_KERNEL: Final = 10_000
"""Microseconds that a send on AF_VSOCK may wait for room. Credit comes in small lumps there, and to
poll for each is dear. Unix sockets gain nothing by it."""

BACKLOG: Final = 128
"""Connections the kernel keeps for us between two looks."""


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
    Strategy.SENDFILE: _lib.SENDFILE,
    Strategy.SPLICE: _lib.SPLICE,
    Strategy.MMAP: _lib.MMAP,
    Strategy.READ: _lib.READ,
}
_STRATEGIES: Final = {code: strategy for strategy, code in _CODES.items()}


@dataclass(frozen=True)
class VsockAddress:
    """An AF_VSOCK address: 32-bit context id and port."""

    cid: int
    port: int

    family = socket.AF_VSOCK

    def __str__(self) -> str:
        cid = "any" if self.cid == VMADDR_CID_ANY else self.cid
        return f"vsock:{cid}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    """A Unix stream socket's path, 1 to 107 bytes."""

    path: str

    family = socket.AF_UNIX

    def __post_init__(self) -> None:
        try:
            encoded = os.fsencode(self.path)
        except UnicodeEncodeError:
            encoded = b""
        if not 0 < len(encoded) <= MAX_UNIX_PATH or b"\0" in encoded:
            raise InvalidArgumentError(
                "uds_path",
                self.path,
                f"with its port suffix must encode to 1 to {MAX_UNIX_PATH} bytes without NUL",
            )

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = Union[VsockAddress, UnixAddress]


@dataclass(frozen=True)
class Peer:
    """Who is at the other end: CID and port on AF_VSOCK, process credentials on Unix sockets.

    The credentials are those of the process that connected (SO_PEERCRED, unix(7)).
    """

    cid: int | None = None
    port: int | None = None
    pid: int | None = None
    uid: int | None = None
    gid: int | None = None

    @classmethod
    def _from(cls, info: _lib.PeerInfo) -> Peer:
        if info.family == socket.AF_VSOCK:
            return cls(cid=info.cid, port=info.port)
        return cls(pid=info.pid, uid=info.uid, gid=info.gid)

    def __str__(self) -> str:
        if self.cid is not None:
            return f"CID {self.cid} port {self.port}"
        return f"pid {self.pid} uid {self.uid}"


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


def _close_fd(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


class WakeUp:
    """A descriptor that becomes readable when somebody wants a call to end.

    `set` may be called from any thread and from signal handlers.
    """

    def __init__(self) -> None:
        # Reentrant: a signal handler may call set while this thread is in close.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        try:
            self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise from_errno(error.errno or 0, Stage.BIND, detail="eventfd") from error

    def fileno(self) -> int:
        """The descriptor, -1 once closed."""
        return self._fd

    def set(self) -> None:
        """Wake whoever waits, now and later. No effect once closed."""
        with self._lock:
            # A forked child shares the descriptor, and would wake its parent.
            if self._fd >= 0 and self._pid == os.getpid():
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Take it back: whoever waits from now on is not woken."""
        with self._lock, suppress(BlockingIOError):
            if self._fd >= 0:
                os.eventfd_read(self._fd)

    def close(self) -> None:
        """Close the descriptor; any number of times."""
        with self._lock:
            fd, self._fd = self._fd, -1
            _close_fd(fd)


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


class Holder:
    """Something that is used by one thread at a time and can be closed from any.

    Closing while a call runs never pulls a descriptor from under it: the call is woken, and closes
    on its way out.
    """

    def __init__(self, wake_up: WakeUp) -> None:
        """Take what ends a running call; whoever made it closes it, after this."""
        self._user_lock = threading.RLock()
        self._user: object | None = None
        self._closing = False
        self._wake_up = wake_up

    def _release(self) -> None:
        """Let go of what is held; called once at least, with no call running."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closing

    def _name(self) -> str:
        return type(self).__name__

    def _take(self, user: object) -> bool:
        """Make this the user, unless there is one; return whether it is the user.

        Ctrl-C may come as soon as a call returns. A lock that is held while something is used would
        then stay locked, without anybody who knows; whoever calls this sees it at `_user`.
        """
        with self._user_lock:
            if self._user is None:
                self._user = user
        return self._user is user

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        user = object()
        try:
            if not self._take(user) and not self._closing:
                raise BusyError(f"another thread is using this {self._name()}")
            if self._closing:  # whoever is closing it may be its user
                raise ClosedError(f"this {self._name()} is closed")
            yield
        except LaunchCancelledError as error:
            if self._closing:
                raise ClosedError(
                    f"this {self._name()} was closed during the call",
                    stage=error.stage,
                    bytes_sent=error.bytes_sent,
                    total=error.total,
                ) from None
            raise
        finally:
            if self._user is user:
                self._user = None
            if self._closing:
                self._release_if_idle()

    def _release_if_idle(self) -> None:
        user = object()
        try:
            if self._take(user):
                self._release()
        finally:
            if self._user is user:
                self._user = None

    def close(self) -> None:
        """Close now, or as soon as a running call has been woken. From any thread, repeatedly."""
        self._closing = True
        self._wake_up.set()
        self._release_if_idle()

    def close_quietly(self) -> None:
        """Close without waking whoever else waits with the same wake-up; no call may be running."""
        self._closing = True
        self._release_if_idle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closing", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()


def _remove_abandoned(path: str) -> bool:
    """Remove a socket's file whose process was killed; return whether it was one.

    Only such a file refuses connections: one that is merely busy takes them, or would block.
    """
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        found = os.lstat(path)
        probe.setblocking(False)
        refused = probe.connect_ex(path) == errno.ECONNREFUSED
        if refused and stat.S_ISSOCK(found.st_mode) and os.path.samestat(found, os.lstat(path)):
            Path(path).unlink()
            return True
    return False


class Listener(Holder):
    """A listening socket. On a Unix address it owns the path too, and removes it when closed."""

    def __init__(self, address: Address, wake_up: WakeUp) -> None:
        """Bind and listen.

        Args:
            address: where.
            wake_up: ends a running `admit`; the caller closes it after this.

        Raises:
            VsockBindError, UnsupportedError: as the errno table says.
        """
        self._fd = -1
        super().__init__(wake_up)
        self.address = address
        self._pid = os.getpid()
        self.strangers = 0
        self._inode: tuple[int, int] | None = None
        try:
            self._fd = self._bind(address)
        except NitroVsockError as error:
            error.explain(str(address))
            raise
        finally:
            self._closing = self._fd < 0

    def _bind(self, address: Address) -> int:
        if isinstance(address, VsockAddress):
            return _lib.listen_vsock(address.cid, address.port, BACKLOG)
        try:
            fd = _lib.listen_unix(os.fsencode(address.path), BACKLOG)
        except VsockBindError as error:
            if error.errno != errno.EADDRINUSE or not _remove_abandoned(address.path):
                raise
            fd = _lib.listen_unix(os.fsencode(address.path), BACKLOG)
        try:
            found = Path(address.path).lstat()
        except OSError as error:
            os.close(fd)
            raise from_errno(error.errno or 0, Stage.BIND, detail="lstat") from error
        self._inode = (found.st_dev, found.st_ino)
        return fd

    def fileno(self) -> int:
        """The listening descriptor, -1 once closed."""
        return self._fd

    def admit(
        self, opening: bytes, want_cid: int | None, guard: _lib.Guard, *, strict: bool
    ) -> tuple[Stream, int, dict[str, int]]:
        """Wait for the peer that sends the ready byte, and answer it.

        Args:
            opening: the answer: the ready byte, and what may follow it at once. What the socket
                does not take without waiting is not sent.
            want_cid: refuse other CIDs; None admits any. Without meaning on Unix sockets.
            guard: when to give up.
            strict: end with an error at the first stranger.

        Returns:
            The stream, bytes of the opening that were sent (1 at least), and the strangers refused
            by reason.

        Raises:
            NitroVsockError: as the errno table says, with `refused` set.
        """
        if isinstance(self.address, UnixAddress):
            want_cid = None
        with self._in_use(), _lib.Gate(self._fd, want_cid, opening, strict=strict) as gate:
            try:
                fd, sent = gate.admit(guard)
            except NitroVsockError as error:
                error.refused = gate.refused
                if isinstance(error, VsockCidMismatchError):
                    error.expected, error.actual = want_cid, gate.peer.cid
                    error.explain(f"expected CID {want_cid}, got CID {gate.peer.cid}")
                if any(gate.refused.values()):
                    error.explain(f"strangers refused: {gate.refused}")
                raise
            stream = Stream(fd, self.address.family, Peer._from(gate.peer), self._wake_up)
            return stream, sent, gate.refused

    def accept(self, want_cid: int | None) -> socket.socket | None:
        """Accept a connection that waits already; None where none of the wanted CID does.

        Others are closed, at most BACKLOG of them. The socket does not block.

        Raises:
            VsockAcceptError: for want of descriptors, for instance.
        """
        with self._in_use():
            for _ in range(BACKLOG):
                found = _lib.accept(self._fd)
                if found is None:
                    return None
                fd, peer = found
                connection = wrap_socket(fd)
                if (
                    want_cid is None
                    or self.address.family != socket.AF_VSOCK
                    or (peer.cid == want_cid)
                ):
                    return connection
                connection.close()
                self.strangers += 1
        return None

    def _release(self) -> None:
        # A forked child holds a copy of the descriptor, but the path is its parent's.
        if isinstance(self.address, UnixAddress) and self._inode and self._pid == os.getpid():
            path = Path(self.address.path)
            # What cannot be removed, after a change of user for instance, stays.
            with suppress(OSError):
                found = path.lstat()
                if (found.st_dev, found.st_ino) == self._inode:
                    path.unlink()
        self._inode = None  # only now: Ctrl-C may end this, and the next call does it then
        fd, self._fd = self._fd, -1
        _close_fd(fd)

    def __repr__(self) -> str:
        return f"<Listener {self.address} fd={self._fd}>"


class Stream(Holder):
    """A connected socket."""

    def __init__(self, fd: int, family: int, peer: Peer, wake_up: WakeUp) -> None:
        """Take ownership of a connected, non-blocking descriptor."""
        self._fd = fd
        super().__init__(wake_up)
        self.family = family
        self.peer = peer
        if family == socket.AF_VSOCK:
            _lib.block_briefly(fd, WAIT_IN_KERNEL)

    def fileno(self) -> int:
        """The descriptor, -1 once closed."""
        return self._fd

    def send(self, data: bytes | memoryview, guard: _lib.Guard, meter: Meter) -> None:
        """Send all of a buffer. Raises what the errno table says for the meter's stage."""
        with self._in_use():
            _lib.send(self._fd, data, guard, meter)

    def send_from(
        self, payload: FilePayload, strategy: Strategy, guard: _lib.Guard, meter: Meter
    ) -> Strategy:
        """Send a payload; return the strategy in use at the end.

        Raises what the errno table says for the meter's stage.
        """
        with self._in_use():
            if strategy is Strategy.AUTO:
                strategy = choose_strategy(self.family, payload)
            code = _lib.send_from(
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
                _lib.enlarge_sndbuf(self._fd, SEND_BUFFER)

    def handshake(self, ready: int, guard: _lib.Guard) -> None:
        """Exchange the ready byte as the side that connected."""
        with self._in_use():
            _lib.handshake(self._fd, ready, guard)

    def receive(self, view: memoryview, guard: _lib.Guard, meter: Meter) -> int:
        """Receive once into a writable buffer; return the count, 0 at end of stream."""
        with self._in_use():
            return _lib.receive(self._fd, view, guard, meter)

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        _close_fd(fd)

    def __repr__(self) -> str:
        return f"<Stream {self.peer} fd={self._fd}>"


def connect(address: Address, guard: _lib.Guard, wake_up: WakeUp) -> Stream:
    """Connect to an address. Raises what the errno table says for stage connect."""
    try:
        if isinstance(address, VsockAddress):
            fd = _lib.connect_vsock(address.cid, address.port, guard)
            return Stream(fd, socket.AF_VSOCK, Peer(address.cid, address.port), wake_up)
        fd = _lib.connect_unix(os.fsencode(address.path), guard)
        return Stream(fd, socket.AF_UNIX, Peer(), wake_up)
    except NitroVsockError as error:
        error.explain(str(address))
        raise
