"""Owns: exit codes; what an exception becomes: a code, a line for people, an object for machines.

Must not know: which command failed, where it is written.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import click

from nitro_vsock import errors


class ExitCode(IntEnum):
    """What the process exits with."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    CONNECTION = 3
    DEADLINE = 4
    PEER = 5
    SOURCE = 6
    PROTOCOL = 7
    ENCLAVE_DIED = 8
    UNSUPPORTED = 9
    PREFLIGHT = 10
    HOST = 125
    INTERRUPTED = 130
    TERMINATED = 143


MEANING: Final = {
    ExitCode.OK: "success",
    ExitCode.UNEXPECTED: "anything else; demo: the digests differ",
    ExitCode.USAGE: "wrong usage or an argument that cannot be used",
    ExitCode.CONNECTION: "bind, accept or connect failed",
    ExitCode.DEADLINE: "the deadline passed",
    ExitCode.PEER: "the peer: closed, another CID, wrong ready byte, read or write failed",
    ExitCode.SOURCE: "the root file system or the image: unreadable, malformed, cut short, changed",
    ExitCode.PROTOCOL: "receive, guest: the bytes break the protocol or a rule of the guest",
    ExitCode.ENCLAVE_DIED: "the enclave died",
    ExitCode.UNSUPPORTED: "this kernel has no AF_VSOCK; eif: the package cryptography is missing",
    ExitCode.PREFLIGHT: "check, send: the guest would fail on this launch; nothing was sent",
    ExitCode.HOST: "host: the host's side failed; other codes of `host` are the program's",
    ExitCode.INTERRUPTED: "interrupted (SIGINT, Ctrl-C)",
    ExitCode.TERMINATED: "terminated (SIGTERM)",
}
"""One line a code, for --help; docs/cli.md has the same."""

_CODES: Final[tuple[tuple[type[BaseException], ExitCode], ...]] = (
    (click.ClickException, ExitCode.USAGE),
    (errors.PreflightError, ExitCode.PREFLIGHT),
    (errors.InvalidArgumentError, ExitCode.USAGE),
    (errors.VsockBindError, ExitCode.CONNECTION),
    (errors.VsockAcceptError, ExitCode.CONNECTION),
    (errors.VsockConnectError, ExitCode.CONNECTION),
    (errors.DeadlineError, ExitCode.DEADLINE),
    (errors.PeerClosedError, ExitCode.PEER),
    (errors.VsockCidMismatchError, ExitCode.PEER),
    (errors.ReadySignalNotDetectedError, ExitCode.PEER),
    (errors.VsockReadError, ExitCode.PEER),
    (errors.VsockWriteError, ExitCode.PEER),
    (errors.SourceError, ExitCode.SOURCE),
    (errors.EifError, ExitCode.SOURCE),
    (errors.ProtocolError, ExitCode.PROTOCOL),
    (errors.ReturnCodeError, ExitCode.PEER),
    (errors.ProxyError, ExitCode.HOST),
    (errors.EnclaveDiedError, ExitCode.ENCLAVE_DIED),
    (errors.UnsupportedError, ExitCode.UNSUPPORTED),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
)


class TerminatedError(BaseException):
    """SIGTERM came. Like KeyboardInterrupt it is not for `except Exception`."""


class DemoError(Exception):
    """The demonstration failed for a reason that no library error stands for.

    Attributes:
        code: what to exit with.
        details: the reader's own error object, where it is the one that failed.
    """

    def __init__(
        self, message: str, code: int = ExitCode.UNEXPECTED, details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.details = details or {}


class ContestError(Exception):
    """A process of a comparison failed; there is no result."""


def exit_code(error: BaseException) -> int:
    """Return what to exit with."""
    if isinstance(error, DemoError):
        return error.code
    if isinstance(error, TerminatedError):
        return ExitCode.TERMINATED
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return ExitCode.UNEXPECTED


def message(error: BaseException) -> str:
    """Return one line that says what is wrong."""
    if isinstance(error, click.UsageError):
        hint = f" (see '{error.ctx.command_path} --help')" if error.ctx is not None else ""
        text = error.format_message().rstrip(".") + hint
    elif isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, TerminatedError):
        text = "terminated"
    elif isinstance(error, errors.NitroVsockError):
        text = str(error)
        if error.must_terminate_enclave:
            text += "; the enclave holds part of the launch: end it"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename is not None:
            text = f"{error.filename!r}: {text}"
    elif isinstance(error, (DemoError, ContestError, OSError)):
        text = str(error)
    else:
        text = f"unexpected {type(error).__name__}: {error}"
    # It may quote a name in an archive, or what the other side sent.
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in " ".join(text.split())
    )


def as_object(error: BaseException) -> dict[str, Any]:
    """Return the object that `--json` prints; what does not apply is None."""
    stage = getattr(error, "stage", None)
    details: dict[str, Any] = {
        "class": type(error).__name__,
        "message": message(error),
        "stage": str(stage) if stage is not None else None,
        "errno": getattr(error, "errno", None),
        "bytes_sent": getattr(error, "bytes_sent", None),
        "total": getattr(error, "total", None),
        "must_terminate_enclave": getattr(error, "must_terminate_enclave", None),
    }
    if isinstance(error, DemoError):
        details |= error.details
    if isinstance(error, errors.PreflightError):
        details["findings"] = [finding.as_dict() for finding in error.findings]
    return {"error": details}
