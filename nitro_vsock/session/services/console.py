"""Owns: the console of an enclave in debug mode.

Must not know: when a session begins and ends, how descriptors are waited for.
"""

from __future__ import annotations

import errno
import logging
import socket

from nitro_vsock.protocol import VMADDR_CID_HYPERVISOR, VsockPortOffset
from nitro_vsock.session.outputs import Output, Target, open_output
from nitro_vsock.session.services.output import OutputService
from nitro_vsock.transport import Address, EventLoop, UnixAddress


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
