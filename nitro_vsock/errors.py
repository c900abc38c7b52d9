"""Owns: the exception tree, and the one table that turns an errno value into an exception.

Must not know: anything else of this package.
"""

from __future__ import annotations

import errno as _errno
import os
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Stage(str, Enum):
    """What was going on when an error happened."""

    VALIDATE = "validate"
    BIND = "bind"
    CONNECT = "connect"
    ACCEPT = "accept"
    HANDSHAKE = "handshake"
    ARGUMENTS = "arguments"
    ROOTFS = "rootfs"
    FINISH = "finish"
    CLOSE = "close"
    READ = "read"
    SERVICES = "services"
    """The guest unpacks, then connects to its services."""
    RUN = "run"
    STOP = "stop"
    """From `terminate` to the return code."""
    DRAIN = "drain"
    """The return code is here, the rest of the output is not yet."""

    def __str__(self) -> str:
        return self.value


_GUEST_HAS_BYTES = frozenset(
    {
        *(Stage.ARGUMENTS, Stage.ROOTFS, Stage.FINISH, Stage.CLOSE),
        *(Stage.SERVICES, Stage.RUN, Stage.STOP, Stage.DRAIN),
    }
)


class NitroVsockError(Exception):
    """Root of every exception this package raises on purpose.

    Attributes:
        errno: errno value behind the error, or None.
        stage: what was going on, or None.
        bytes_sent: bytes the socket had taken (for a reader: bytes received) when it happened.
        total: bytes the whole stream would have had, or None where that was not known.
        refused: strangers refused before it happened, by reason.
        last_output: of a session: the last lines the guest had sent, as far as they were kept.
    """

    errno: int | None
    stage: Stage | None
    bytes_sent: int
    total: int | None

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        stage: Stage | None = None,
        bytes_sent: int = 0,
        total: int | None = None,
    ) -> None:
        if isinstance(self, OSError):
            OSError.__init__(self, errno, message)
        else:
            Exception.__init__(self, message)
            self.errno = errno
        self.message = message
        self.stage = stage
        self.bytes_sent = bytes_sent
        self.total = total
        self.refused: dict[str, int] = {}
        self.last_output: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), {**self.__dict__, "errno": self.errno})

    def explain(self, text: str) -> None:
        """Append what the raiser knew and the errno table could not."""
        self.message = f"{self.message}; {text}"

    @property
    def must_terminate_enclave(self) -> bool:
        """True when the guest got a part of the stream: it may wait or spin for ever now."""
        return self.stage in _GUEST_HAS_BYTES


def _restore(cls: type[NitroVsockError], state: dict[str, Any]) -> NitroVsockError:
    """Rebuild a pickled exception, whatever its own constructor asks for."""
    # Not cls.__new__: with ValueError before OSError among the bases it is the wrong one.
    error = OSError.__new__(cls) if issubclass(cls, OSError) else Exception.__new__(cls)
    NitroVsockError.__init__(error, state["message"], errno=state["errno"])
    for name, value in state.items():
        setattr(error, name, value)
    return error


class InvalidArgumentError(NitroVsockError, ValueError):
    """An argument cannot be used; nothing was bound or sent.

    Attributes:
        field: which argument.
        value: what it was.
        limit: what it may be, in words.
        code: of the preflight's finding that says the same, or None.
    """

    code: str | None = None

    def __init__(self, field: str, value: object, limit: str) -> None:
        try:
            shown = repr(value)
        except ValueError:  # an int too long to be shown (sys.set_int_max_str_digits)
            shown = f"a {type(value).__name__} of very many digits"
        if len(shown) > 80:
            shown = f"{shown[:60]}... ({len(shown)} characters)"
        super().__init__(f"{field}: {limit}, got {shown}", stage=Stage.VALIDATE)
        self.field = field
        self.value = value
        self.limit = limit


class PreflightError(InvalidArgumentError):
    """The guest would fail on this launch; nothing was bound or sent.

    Attributes:
        field: which argument, or which member of the archive.
        value: the code of the first error found.
        limit: why the guest would fail, and what to do.
        findings: everything that was found, warnings too; each a `Finding`.
    """

    def __init__(self, field: str, code: str, limit: str, findings: tuple[Any, ...]) -> None:
        super().__init__(field, code, limit)
        self.message = f"{field}: {limit} (preflight: {code})"
        self.findings = findings


def require_int(field: str, value: object, least: int, most: int, why: str = "") -> int:
    """Return `value` where it is an int of the range, bool excluded.

    Raises:
        InvalidArgumentError: it is not; `why` explains the range.
    """
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    limit = f"must be {least} to {most}"
    raise InvalidArgumentError(field, value, f"{limit} ({why})" if why else limit)


class UnsupportedError(NitroVsockError, OSError):
    """This machine cannot do it, for instance AF_VSOCK without the kernel's vsock module."""


class VsockBindError(NitroVsockError, OSError):
    """The socket could not be bound or made to listen."""


class VsockAcceptError(NitroVsockError, OSError):
    """No further connection could be accepted, for instance for want of descriptors."""


class VsockConnectError(NitroVsockError, ConnectionError):
    """The reader could not connect to the host."""


class DeadlineError(NitroVsockError, TimeoutError):
    """The deadline passed; which subclass says where."""


class PollNoEventsError(DeadlineError):
    """No guest connected before the deadline; `refused` counts who did."""


class ConnectTimeoutError(DeadlineError):
    """The reader's connection was not answered before the deadline."""


class HandshakeTimeoutError(DeadlineError):
    """A peer connected, but the ready bytes were not exchanged before the deadline."""


class StreamTimeoutError(DeadlineError):
    """The deadline passed in the middle of the stream; bytes_sent says how far it got."""


class ReadySignalNotDetectedError(NitroVsockError):
    """The peer's first byte is not 0xb7, or it closed before sending one."""


class VsockCidMismatchError(NitroVsockError):
    """Only with strict_peer: a peer with another CID connected first.

    Attributes:
        expected: the CID waited for.
        actual: the CID that came.
    """

    expected: int | None = None
    actual: int | None = None


class VsockReadError(NitroVsockError, OSError):
    """Receiving failed."""


class VsockWriteError(NitroVsockError, OSError):
    """Sending failed for another reason than a closed peer."""


class PeerClosedError(NitroVsockError, ConnectionError):
    """The peer closed or reset the connection before everything was sent or received."""


class SourceError(NitroVsockError):
    """The root file system's source is at fault; Finished was not sent.

    Attributes:
        offset: bytes from the start of the payload.
    """

    offset: int = 0


class SourceReadError(SourceError, OSError):
    """The source could not be read."""


class SourceTruncatedError(SourceError):
    """The source ended before its declared length."""


class SourceChangedError(SourceError):
    """The file was written to while it was sent; the guest may have got a mixture."""


class ArchiveError(SourceError, ValueError):
    """A foreign tar is broken, or has a member that the guest could not or must not unpack.

    Attributes:
        member: its name as it stands in the archive; empty where none is to blame.
        offset: bytes from the start of the file to its header.
    """

    member: str = ""


class EifError(NitroVsockError, ValueError):
    """An enclave image is malformed, has changed while it was read, or its signature is not valid.

    Attributes:
        field: which field or section, such as `num_sections` or `section 2 (cmdline)`.
        offset: bytes from the start of the file to it, or None where no place is to blame.
    """

    field: str = ""
    offset: int | None = None


class EifReadError(EifError, OSError):
    """An enclave image, or a file that one is built from, could not be opened or read."""


class LaunchCancelledError(NitroVsockError):
    """`cancel()` was called."""


class EnclaveDiedError(NitroVsockError):
    """The watched descriptor hung up: the enclave is gone."""


class SessionTimeoutError(DeadlineError):
    """A session's deadline passed after the launch; `stage` says which: services, run or stop."""


class ReturnCodeError(NitroVsockError):
    """The guest reported no exit status, or something that is none."""


class ProxyError(NitroVsockError, OSError):
    """A proxy's own end failed: output that cannot be written, a network backend that is gone."""


class BusyError(NitroVsockError):
    """Another thread is in the middle of a call on the same object."""


class ClosedError(NitroVsockError):
    """The object was closed, or has done its one launch."""


class ProtocolError(NitroVsockError, ValueError):
    """The bytes a reader received break the launch protocol."""


class UnknownFrameError(ProtocolError):
    """A frame id the protocol does not have."""


class DuplicateFrameError(ProtocolError):
    """A frame id that was there before."""


class MissingFrameError(ProtocolError):
    """Finished came before a mandatory frame."""


class LimitExceededError(ProtocolError):
    """A length or count above the reader's limit; nothing was allocated for it."""


class BadStringError(ProtocolError):
    """A string without its trailing NUL, or with a NUL inside."""


class EarlyEndError(ProtocolError, ConnectionError):
    """The stream ended before Finished."""


class GuestRuleError(ProtocolError):
    """Only with strict: the stream is well formed, but the real guest would fail on it."""


@dataclass(frozen=True)
class ErrnoRow:
    """One row of the errno table. None stands for "any".

    `source` tells errors of the rootfs's descriptor from errors of the socket.
    """

    stage: Stage | None
    code: int | None
    cls: type[NitroVsockError]
    text: str
    source: bool = False


_SENDING = (Stage.HANDSHAKE, Stage.ARGUMENTS, Stage.ROOTFS, Stage.FINISH)

ERRNO_TABLE: tuple[ErrnoRow, ...] = (
    ErrnoRow(None, _errno.ECANCELED, LaunchCancelledError, "cancelled"),
    ErrnoRow(None, _errno.EOWNERDEAD, EnclaveDiedError, "the enclave died"),
    ErrnoRow(
        Stage.ACCEPT, _errno.ETIME, PollNoEventsError, "no guest connected before the deadline"
    ),
    ErrnoRow(Stage.CONNECT, _errno.ETIME, ConnectTimeoutError, "the host did not answer in time"),
    ErrnoRow(Stage.HANDSHAKE, _errno.ETIME, HandshakeTimeoutError, "the peer sent no ready byte"),
    ErrnoRow(None, _errno.ETIME, StreamTimeoutError, "the deadline passed"),
    ErrnoRow(None, _errno.EREMCHG, VsockCidMismatchError, "another CID connected"),
    ErrnoRow(
        Stage.HANDSHAKE,
        _errno.ENODATA,
        ReadySignalNotDetectedError,
        "the peer closed instead of sending the ready byte",
    ),
    ErrnoRow(
        None, _errno.EBADMSG, ReadySignalNotDetectedError, "the peer's first byte is not 0xb7"
    ),
    ErrnoRow(None, _errno.ENODATA, SourceTruncatedError, "the rootfs source ended early", True),
    ErrnoRow(None, None, SourceReadError, "the rootfs source could not be read", True),
    ErrnoRow(Stage.BIND, _errno.EAFNOSUPPORT, UnsupportedError, "this kernel has no such socket"),
    ErrnoRow(
        Stage.BIND, _errno.EADDRINUSE, VsockBindError, "the address is in use by another socket"
    ),
    ErrnoRow(Stage.BIND, _errno.EACCES, VsockBindError, "binding is not permitted"),
    ErrnoRow(Stage.BIND, None, VsockBindError, "the socket could not be bound"),
    ErrnoRow(
        Stage.CONNECT, _errno.EAFNOSUPPORT, UnsupportedError, "this kernel has no such socket"
    ),
    ErrnoRow(
        Stage.CONNECT, _errno.ETIMEDOUT, ConnectTimeoutError, "the host did not answer in time"
    ),
    ErrnoRow(Stage.CONNECT, None, VsockConnectError, "the host could not be connected to"),
    ErrnoRow(Stage.ACCEPT, None, VsockAcceptError, "no connection could be accepted"),
    ErrnoRow(Stage.SERVICES, None, VsockAcceptError, "no connection could be accepted"),
    ErrnoRow(Stage.READ, _errno.ECONNRESET, PeerClosedError, "the host reset the connection"),
    ErrnoRow(Stage.READ, None, VsockReadError, "receiving failed"),
    ErrnoRow(Stage.CLOSE, _errno.ECONNRESET, PeerClosedError, "the guest closed with bytes unread"),
    ErrnoRow(Stage.CLOSE, None, VsockReadError, "receiving failed"),
    ErrnoRow(Stage.ROOTFS, _errno.EFAULT, SourceReadError, "the rootfs's memory could not be read"),
    *(
        ErrnoRow(stage, code, PeerClosedError, "the peer closed the connection")
        for stage in _SENDING
        for code in (_errno.EPIPE, _errno.ECONNRESET, _errno.ENOTCONN)
    ),
    ErrnoRow(None, None, VsockWriteError, "sending failed"),
)
"""Searched from the top; the first row that fits decides."""


def find_row(code: int, stage: Stage, *, source: bool = False) -> ErrnoRow:
    """Return the row of ERRNO_TABLE for a positive errno value."""
    for row in ERRNO_TABLE:
        if row.source == source and row.stage in (stage, None) and row.code in (code, None):
            return row
    raise AssertionError("ERRNO_TABLE lacks a row that fits everything")


def from_errno(
    code: int,
    stage: Stage,
    *,
    source: bool = False,
    bytes_sent: int = 0,
    total: int | None = None,
    detail: str = "",
) -> NitroVsockError:
    """Build the exception for a positive errno value; the caller raises it.

    Codes of our own (see csrc/nv_wait.h) get a plain sentence; what the kernel said is quoted.
    """
    row = find_row(code, stage, source=source)
    own = code in (
        _errno.ECANCELED,
        _errno.EOWNERDEAD,
        _errno.ETIME,
        _errno.EREMCHG,
        _errno.EBADMSG,
        _errno.ENODATA,
    )
    parts = [row.text if own else f"{row.text}: {os.strerror(code)} ({_errno.errorcode.get(code)})"]
    if detail:
        parts.append(detail)
    if total is not None:
        parts.append(f"{bytes_sent:,} of {total:,} bytes were through (stage {stage})")
    reported = _errno.ETIMEDOUT if code == _errno.ETIME else code
    return row.cls(
        "; ".join(parts), errno=reported, stage=stage, bytes_sent=bytes_sent, total=total
    )
