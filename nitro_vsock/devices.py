"""Owns: the proxies a launch can have: output, network, signals, return code, console.

Must not know: when a session begins and ends, how descriptors are waited for.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from nitro_vsock._lib import FlowState
from nitro_vsock.errors import InvalidArgumentError, ProxyError, ReturnCodeError, require_int
from nitro_vsock.frames import AppOutput, NetworkProxy
from nitro_vsock.loop import READABLE, WRITABLE, EventLoop, Relay
from nitro_vsock.outputs import Output, Tail, Target, open_output
from nitro_vsock.protocol import VMADDR_CID_HYPERVISOR, VsockPortOffset
from nitro_vsock.sources import PathLike
from nitro_vsock.transport import Address, UnixAddress, wrap_socket

logger = logging.getLogger("nitro_vsock")

CHUNK: Final = 256 << 10
"""Bytes of output received at once."""

MIN_FRAME: Final = 14 + 68
MAX_FRAME: Final = 14 + 65535
"""What a guest may say its largest Ethernet frame is: 14 bytes of header and an MTU of 68 (RFC 791)
to 65535, the most a tap device takes (`linux/if_tun.h`)."""

_INT: Final = struct.Struct("=i")
_FRAME: Final = struct.Struct(">I")
_GONE: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN})


def _receive_into(connection: socket.socket, room: memoryview) -> int | None:
    """Receive once: how much, 0 where the guest has ended, however; None where nothing is there."""
    try:
        return connection.recv_into(room)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return 0


def _receive(connection: socket.socket, most: int) -> bytes | None:
    """Do the same for a few bytes; return them."""
    room = bytearray(most)
    count = _receive_into(connection, memoryview(room))
    return None if count is None else bytes(room[:count])


class OutputProxy:
    """The program's standard output and standard error, one stream as the guest sends it."""

    port_offset = VsockPortOffset.APP_OUTPUT

    def __init__(self, target: Target, *, append: bool = False, level: int = logging.INFO) -> None:
        """Nothing is opened yet.

        Args:
            target: where the output goes:
                a path: created or emptied when a session begins; opening a FIFO that nobody reads
                is an error;
                a descriptor: duplicated, or opened anew where it is a pipe or terminal; bytes
                unchanged;
                an object with `write`: bytes unchanged, or text decoded from UTF-8 where it is a
                text file; flushed after each write; may block, and holds up all proxies meanwhile;
                a callable: gets each line as str, without its end, bytes that are not UTF-8
                escaped; in pieces where it is longer than 64 KiB;
                a `logging.Logger`: a record for each line.
            append: with a path: add to the file.
            level: with a logger: of the records.
        """
        self._target = target
        self._append = append
        self._level = level

    def arg(self) -> AppOutput:
        """Return the frame that makes the guest send it."""
        return AppOutput()

    def open(self) -> OutputService:
        """Open the target.

        Raises:
            InvalidArgumentError: it is none.
            ProxyError: it cannot be opened.
        """
        return OutputService(open_output(self._target, append=self._append, level=self._level))


class OutputService:
    """Output of one session, from the guest's socket to its place, with backpressure."""

    def __init__(self, output: Output) -> None:
        """Take an open place; it is closed with this."""
        self.tail = Tail()
        self.finished = False
        self.received = 0
        self._output = output
        self._buffer = memoryview(bytearray(CHUNK))
        self._waiting = self._buffer[:0]
        self._connection: socket.socket | None = None

    @property
    def blocked(self) -> bool:
        """Whether it waits for its own target, not for the guest."""
        return bool(self._waiting)

    def connected(self, connection: socket.socket, loop: EventLoop) -> None:
        """Receive from now on."""
        self._connection, self._loop = connection, loop
        loop.watch(connection.fileno(), READABLE, self._receive)

    def _receive(self, _events: int) -> None:
        assert self._connection is not None  # noqa: S101 - watched only once connected
        count = _receive_into(self._connection, self._buffer)
        if count is None:
            return
        if count == 0:
            self._loop.unwatch(self._connection.fileno())
            self.finished = True
            return
        self.received += count
        self._waiting = self._buffer[:count]
        self.tail.add(self._waiting)
        self._deliver()
        if self._waiting:
            self._loop.unwatch(self._connection.fileno())
            self._loop.watch(self._output.fileno(), WRITABLE, self._go_on)

    def _deliver(self) -> None:
        self._waiting = self._waiting[self._output.write(self._waiting) :]

    def _go_on(self, _events: int) -> None:
        assert self._connection is not None  # noqa: S101
        self._deliver()
        if not self._waiting:
            self._loop.unwatch(self._output.fileno())
            self._loop.watch(self._connection.fileno(), READABLE, self._receive)

    def close(self) -> None:
        """Close the place. Raises ProxyError where it says only now that it could not write."""
        self._output.close()


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


class NetService:
    """The network of one session."""

    finished = True

    def __init__(self, backend: socket.socket) -> None:
        """Take the backend; it is closed with this, and as blocking as it came."""
        self.frame_bytes = 0
        """The guest's MTU + 14; 0 until it said so."""
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
        got = _receive(self._connection, _FRAME.size - len(self._header))
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
        self.frame_bytes = _FRAME.unpack(self._header)[0]
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
            if flow.state is failed and flow.error in _GONE:
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


class SignalHandler:
    """Signals for the program. The guest acts on SIGTERM only, so that is what is written."""

    port_offset = VsockPortOffset.SIGNAL_HANDLER

    def __init__(self, signals: Iterable[int] = (signal.SIGTERM,)) -> None:
        """Nothing is changed yet.

        Args:
            signals: of this process; while a session runs from the main thread, each of them is
                passed on as SIGTERM in place of the program's own handler, which comes back
                afterwards. Empty: only `EnclaveSession.terminate` sends one.

        Raises:
            InvalidArgumentError: no signal, or one that cannot be handled.
        """
        try:
            self.signals: tuple[int, ...] = tuple(signals)
        except TypeError:
            raise InvalidArgumentError("signals", signals, "must be a list of signals") from None
        usable = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
        for number in self.signals:
            if not isinstance(number, int) or number not in usable:
                raise InvalidArgumentError("signals", number, "must be signals with a handler")

    def arg(self) -> None:
        """Return None: the guest connects always."""

    def open(self) -> SignalService:
        """Return the service of one session."""
        return SignalService()


class SignalService:
    """The signal connection of one session, kept open until the guest closes it.

    The guest would read our end of file as SIGTERM, again and again.
    """

    def __init__(self) -> None:
        self.gone = False
        """The guest has closed its end."""
        self.written = 0
        """Signals written."""
        self._unsent = b""
        self._sent = 0
        self._connection: socket.socket | None = None

    @property
    def finished(self) -> bool:
        """Whether the guest has closed."""
        return self.gone or self._connection is None

    def connected(self, connection: socket.socket, loop: EventLoop) -> None:
        """Write what is due, and wait for the guest's end."""
        self._connection, self._loop = connection, loop
        self._watch()
        self._write()

    def _watch(self) -> None:
        assert self._connection is not None  # noqa: S101
        events = READABLE | (WRITABLE if self._unsent else 0)
        self._loop.watch(self._connection.fileno(), events, self._look)

    def _look(self, events: int) -> None:
        assert self._connection is not None  # noqa: S101
        if events & WRITABLE:
            self._write()
        if events & ~WRITABLE:
            try:
                self.gone = not self._connection.recv(64)
            except BlockingIOError:
                return
            except OSError:
                self.gone = True
        if self.gone:
            self._loop.unwatch(self._connection.fileno())

    def send(self) -> None:
        """Write one SIGTERM, now or as soon as the guest is connected."""
        self._unsent += _INT.pack(signal.SIGTERM)
        if self._connection is not None and not self.gone:
            self._write()

    def _write(self) -> None:
        assert self._connection is not None  # noqa: S101
        had = bool(self._unsent)
        try:
            sent = self._connection.send(self._unsent, socket.MSG_NOSIGNAL) if had else 0
        except BlockingIOError:
            sent = 0
        except OSError:  # it is closing: nothing is left to be ended
            sent, self._unsent = 0, b""
        self._unsent = self._unsent[sent:]
        self._sent += sent
        self.written = self._sent // _INT.size
        if had and not self.gone:
            self._watch()

    def close(self) -> None:
        """Nothing of its own is open."""


@dataclass(frozen=True)
class WaitStatus:
    """What became of the program, as wait(2) says it.

    Attributes:
        status: the wait status, as the guest sent it.
    """

    status: int

    def __post_init__(self) -> None:
        exited = 0 <= self.status <= 0xFFFF and self.status & 0xFF == 0
        if not exited and not (0 < self.status <= 0xFF and 0 < self.status & 0x7F < signal.NSIG):
            raise ReturnCodeError(
                f"the guest reported {self.status:#x}, which is no wait status of an ended program",
                errno=errno.EBADMSG,
            )

    @property
    def exit_code(self) -> int | None:
        """0 to 255, or None where a signal ended it."""
        return os.WEXITSTATUS(self.status) if os.WIFEXITED(self.status) else None

    @property
    def signal(self) -> int | None:
        """The signal that ended it, or None."""
        return os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else None

    @property
    def core_dumped(self) -> bool:
        """Whether it left a core dump."""
        return os.WIFSIGNALED(self.status) and os.WCOREDUMP(self.status)

    @property
    def returncode(self) -> int:
        """The same as `subprocess.Popen.returncode`: the exit code, or minus the signal."""
        return os.waitstatus_to_exitcode(self.status)

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit code {self.exit_code}"
        return f"ended by signal {self.signal}"


class ReturnCode:
    """The program's wait status. The guest waits for an answer before it goes down."""

    port_offset = VsockPortOffset.RETURN_CODE

    def arg(self) -> None:
        """Return None: the guest connects always."""

    def open(self) -> ReturnCodeService:
        """Return the service of one session."""
        return ReturnCodeService()


class ReturnCodeService:
    """The return code of one session."""

    def __init__(self) -> None:
        self.status: WaitStatus | None = None
        self.closed = False
        """The guest has closed its end."""
        self._got = b""
        self._connection: socket.socket | None = None

    @property
    def finished(self) -> bool:
        """Always: the session itself waits for the status."""
        return True

    def connected(self, connection: socket.socket, loop: EventLoop) -> None:
        """Receive the status."""
        self._connection, self._loop = connection, loop
        loop.watch(connection.fileno(), READABLE, self._receive)

    def _receive(self, _events: int) -> None:
        assert self._connection is not None  # noqa: S101
        got = _receive(self._connection, _INT.size - len(self._got) or _INT.size)
        if got is None:
            return
        if not got:
            self._loop.unwatch(self._connection.fileno())
            self.closed = True
            if self.status is None:
                raise ReturnCodeError(
                    f"the guest closed its return code connection after {len(self._got)} of "
                    f"{_INT.size} bytes: the program's end is unknown",
                    errno=errno.ECONNRESET,
                )
        elif self.status is None:
            self._got += got
            if len(self._got) == _INT.size:
                self.status = WaitStatus(_INT.unpack(self._got)[0])

    def answer(self) -> None:
        """Let the guest go down. It waits for four bytes, whatever they are."""
        if self._connection is not None and not self.closed:
            with suppress(OSError):  # it is gone already
                self._connection.send(bytes(_INT.size), socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Nothing of its own is open."""


class Console:
    """The console of an enclave in debug mode: what its kernel and init print.

    It is the hypervisor's port CID + 10000, to which the host connects, from the moment the enclave
    exists. Attempts go on until the launch is over; none succeeding is no error.
    """

    port_offset = VsockPortOffset.CONSOLE

    def __init__(self, target: Target, *, append: bool = False, level: int = logging.DEBUG) -> None:
        """Nothing is opened yet. The arguments are those of `OutputProxy`."""
        self._target = target
        self._append = append
        self._level = level

    def arg(self) -> None:
        """Return None: the guest does not know of it."""

    def open(self) -> ConsoleService:
        """Open the target. Raises as `OutputProxy.open` does."""
        return ConsoleService(open_output(self._target, append=self._append, level=self._level))


class ConsoleService(OutputService):
    """The console of one session."""

    def __init__(self, output: Output) -> None:
        """Take an open place; it is closed with this."""
        super().__init__(output)
        self.finished = True
        self._trying: socket.socket | None = None

    def attempt(self, address: Address, loop: EventLoop) -> None:
        """Connect, if that has not succeeded yet. Never waits."""
        if self._connection is not None:
            return
        if self._trying is None:
            self._trying = socket.socket(address.family, socket.SOCK_STREAM)
            self._trying.setblocking(False)
        target = (
            address.path
            if isinstance(address, UnixAddress)
            else (VMADDR_CID_HYPERVISOR, address.port)
        )
        code = self._trying.connect_ex(target)
        if code in (0, errno.EISCONN):
            connection, self._trying = self._trying, None
            self.connected(connection, loop)
        elif code not in (errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN, errno.EINTR):
            self._trying.close()
            self._trying = None

    def close(self) -> None:
        """Close the connection and the place."""
        for sock in (self._trying, self._connection):
            if sock is not None:
                sock.close()
        super().close()
