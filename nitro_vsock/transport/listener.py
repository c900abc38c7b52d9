"""Owns: listening sockets, and the path of a Unix one.

Must not know: the launch protocol.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from nitro_vsock.core import Gate, Guard, sockets
from nitro_vsock.errors import (
    NitroVsockError,
    Stage,
    VsockBindError,
    VsockCidMismatchError,
    from_errno,
)
from nitro_vsock.transport.addresses import Address, Peer, UnixAddress, VsockAddress
from nitro_vsock.transport.holder import Holder
from nitro_vsock.transport.sockets import wrap_socket
from nitro_vsock.transport.stream import Stream
from nitro_vsock.transport.wakeup import WakeUp, close_fd

BACKLOG: Final = 128
"""Connections the kernel keeps for us between two looks."""


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
            return sockets.listen_vsock(address.cid, address.port, BACKLOG)
        try:
            fd = sockets.listen_unix(os.fsencode(address.path), BACKLOG)
        except VsockBindError as error:
            if error.errno != errno.EADDRINUSE or not _remove_abandoned(address.path):
                raise
            fd = sockets.listen_unix(os.fsencode(address.path), BACKLOG)
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
        self, opening: bytes, want_cid: int | None, guard: Guard, *, strict: bool
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
        with self._in_use(), Gate(self._fd, want_cid, opening, strict=strict) as gate:
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
                found = sockets.accept(self._fd)
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
        close_fd(fd)

    def __repr__(self) -> str:
        return f"<Listener {self.address} fd={self._fd}>"
