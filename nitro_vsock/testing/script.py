"""Owns: what a guest stand-in can be told to do, and what it says it did.

Must not know: how it does it.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nitro_vsock.launch import EnclaveArgs


class Point(str, Enum):
    """A moment in a guest's life, in the order they come."""

    CONNECT = "connect"
    """Booted; nothing is connected."""
    HANDSHAKE = "handshake"
    """Connected for the arguments; the ready byte is not sent."""
    ARGUMENTS = "arguments"
    """The ready bytes are exchanged; no frame is read."""
    ROOTFS = "rootfs"
    """The first piece of the archive is read, 1 MiB at most."""
    FINISHED = "finished"
    """Everything is read; the connection is still open."""
    UNPACKED = "unpacked"
    """The arguments' connection is closed, the archive unpacked, no proxy connected."""
    OUTPUT = "output"
    """The output is connected. Not reached without the flag."""
    NET = "net"
    """The network is connected and the MTU sent. Not reached without the flag."""
    SIGNAL = "signal"
    """The signal handler is connected; the program does not run yet."""
    RUNNING = "running"
    """The program has been executed."""
    EXITED = "exited"
    """The program has ended, or SIGTERM was forwarded to it; the proxies are still connected."""
    RETURN_CODE = "return-code"
    """The proxies are closed, the return code is connected, nothing sent on it."""
    REPORTED = "reported"
    """The wait status is sent; the host's answer is not read."""

    def __str__(self) -> str:
        return self.value


class Misbehaviour(str, Enum):
    """Something that a guest of ours never does."""

    WRONG_READY = "wrong-ready"
    """Its first byte is 0x00; then it waits for the host to close."""
    SHORT_RETURN_CODE = "short-return-code"
    """Sends two of the return code's four bytes and closes."""
    NO_WAIT_STATUS = "no-wait-status"
    """Reports 0x137f: stopped by signal 19, which is no end of a program."""
    NO_RETURN_CODE = "no-return-code"
    """Goes down after the program without connecting for the return code."""
    UNREAD_ANSWER = "unread-answer"
    """Goes down after the wait status without reading the host's answer."""
    ABSURD_MTU = "absurd-mtu"
    """Sends 0xffffffff in place of the MTU."""
    CUT_MTU = "cut-mtu"
    """Sends two of the MTU's four bytes and closes the network's connection."""
    LONG_FRAME = "long-frame"
    """Sends a frame after the MTU that claims 0x7fffffff bytes, of which 64 come."""
    IGNORE_SIGTERM = "ignore-sigterm"
    """Reads signals and forwards none."""

    def __str__(self) -> str:
        return self.value


class Isolation(str, Enum):
    """What surrounds the program."""

    AUTO = "auto"
    """NAMESPACES where this machine allows it, else PLAIN."""
    NAMESPACES = "namespaces"
    """Mount, PID, network, IPC and UTS namespaces of its own, and chroot; for other users than root
    inside a user namespace."""
    PLAIN = "plain"
    """Nothing: the program is looked up below the unpacked tree, which is its working directory."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class GuestReport:
    """What a guest stand-in did.

    Attributes:
        args: what the launch handed over; None where it never came to that.
        isolation: "namespaces", "user namespaces" or "plain"; None before the archive was unpacked.
        root: the program's root directory as it is seen from here; it is gone by the time
            there is a report, unless a folder was given.
        status: the wait status that was reported; None: none was.
        program_status: the program's own wait status; None where it had not ended.
        signals: every number that came over the signal connection, in order; what was short, and
            its end, are SIGTERM, as in the real guest.
        signals_lost: how many SIGTERMs came before the program ran: they have no effect.
        forwarded: SIGTERM reached the program; 0 is reported then, as by the real guest.
        answer: the host's bytes after the status, up to four; None: not waited for.
        died_at: where it died as told; None: it did not.
        stalled_at: where it stayed as told until it was closed; None: it did not.
        notes: what was not as in a real guest.
        seconds: since the boot, of each point that was reached, by name.
    """

    args: EnclaveArgs | None = None
    isolation: str | None = None
    root: str | None = None
    status: int | None = None
    program_status: int | None = None
    signals: tuple[int, ...] = ()
    signals_lost: int = 0
    forwarded: bool = False
    answer: bytes | None = None
    died_at: Point | None = None
    stalled_at: Point | None = None
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """Whether the host acknowledged the status with four bytes."""
        return self.answer is not None and len(self.answer) == 4

    @property
    def exit_code(self) -> int | None:
        """The program's exit code, or minus the signal that ended it; None: it had not ended."""
        if self.program_status is None:
            return None
        return os.waitstatus_to_exitcode(self.program_status)

    def as_dict(self) -> dict[str, Any]:
        """Return it with plain types only, as JSON wants it."""
        found = dataclasses.asdict(self)
        found["answer"] = None if self.answer is None else self.answer.hex()
        for name in ("died_at", "stalled_at"):
            found[name] = None if found[name] is None else str(found[name])
        return {**found, "exit_code": self.exit_code, "answered": self.answered}
