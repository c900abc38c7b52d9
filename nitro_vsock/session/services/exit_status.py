"""Owns: what became of the program.

Must not know: when a session begins and ends, how descriptors are waited for.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from nitro_vsock.errors import ReturnCodeError
from nitro_vsock.protocol import VsockPortOffset
from nitro_vsock.session.services.receiving import INT, receive
from nitro_vsock.transport import READABLE, EventLoop
from nitro_vsock.wire import DEFAULT_GUEST

MAX_EXIT_CODE: Final = 255


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
        self.guest = DEFAULT_GUEST
        """What the session expects the guest to be: it decides what the number means."""
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
        got = receive(self._connection, INT.size - len(self._got) or INT.size)
        if got is None:
            return
        if not got:
            self._loop.unwatch(self._connection.fileno())
            self.closed = True
            if self.status is None:
                raise ReturnCodeError(
                    f"the guest closed its return code connection after {len(self._got)} of "
                    f"{INT.size} bytes: the program's end is unknown",
                    errno=errno.ECONNRESET,
                )
        elif self.status is None:
            self._got += got
            if len(self._got) == INT.size:
                self.status = self._decoded(INT.unpack(self._got)[0])

    def _decoded(self, said: int) -> WaitStatus:
        if not self.guest.bare_exit_code:
            return WaitStatus(said)
        if not 0 <= said <= MAX_EXIT_CODE:
            raise ReturnCodeError(
                f"the guest reported {said:#x}, which is no exit code: {self.guest} reports 0 to "
                f"{MAX_EXIT_CODE}",
                errno=errno.EBADMSG,
            )
        return WaitStatus(said << 8)

    def answer(self) -> None:
        """Let the guest go down. It waits for four bytes, whatever they are."""
        if self._connection is not None and not self.closed:
            with suppress(OSError):  # it is gone already
                self._connection.send(bytes(INT.size), socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Nothing of its own is open."""
