"""Owns: sockets before any byte flows: listening, connecting, admission, the handshake."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nitro_vsock import errors
from nitro_vsock._core import ffi, lib
from nitro_vsock.core.calls import GUARD_VERDICTS, Guard, drive
from nitro_vsock.errors import Stage

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class PeerInfo:
    """Who the kernel says is at the other end; what does not apply to the family is 0."""

    family: int
    cid: int
    port: int
    pid: int
    uid: int
    gid: int


def listen_vsock(cid: int, port: int, backlog: int) -> int:
    """Return a listening descriptor; raise what ERRNO_TABLE says for stage bind."""
    return _bound(lambda: lib.nv_listen_vsock(cid, port, backlog))


def listen_unix(path: bytes, backlog: int) -> int:
    """Return a listening descriptor; raise what ERRNO_TABLE says for stage bind."""
    return _bound(lambda: lib.nv_listen_unix(path, len(path), backlog))


def _bound(call: Callable[[], int]) -> int:
    while True:
        code = call()
        if code >= 0:
            return code
        if code != -errno.EINTR:
            raise errors.from_errno(-code, Stage.BIND)


def connect_vsock(cid: int, port: int, guard: Guard) -> int:
    """Return a connected descriptor; raise what ERRNO_TABLE says for stage connect."""
    return _connect(lambda out: lib.nv_connect_vsock(cid, port, guard.wait, out), guard)


def connect_unix(path: bytes, guard: Guard) -> int:
    """Return a connected descriptor; raise what ERRNO_TABLE says for stage connect."""
    return _connect(lambda out: lib.nv_connect_unix(path, len(path), guard.wait, out), guard)


def _connect(call: Callable[[Any], int], guard: Guard) -> int:
    out = ffi.new("int32_t *", -1)
    try:
        code = drive(lambda: call(out), guard)
        if code:
            raise errors.from_errno(code, Stage.CONNECT)
        fd, out[0] = int(out[0]), -1
        return fd
    finally:
        if out[0] >= 0:
            os.close(out[0])


class Gate:
    """Admits the one peer that counts; owns every connection that is not admitted.

    Use as a context manager: leaving it closes what is left.
    """

    def __init__(
        self, listen_fd: int, want_cid: int | None, opening: bytes, *, strict: bool
    ) -> None:
        self._gate = ffi.new("struct nv_gate *")
        self._opening = ffi.new("uint8_t[]", opening)
        self._gate.opening = self._opening
        self._gate.opening_length = len(opening)
        self._gate.listen_fd = listen_fd
        self._gate.want_cid = lib.NV_CID_ANY if want_cid is None else want_cid
        self._gate.strict = strict
        self._gate.ready = opening[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.nv_gate_close(self._gate)

    def admit(self, guard: Guard) -> tuple[int, int]:
        """Wait for the peer; return its descriptor and how much of the opening its socket took.

        The descriptor is the caller's from then on.

        Raises what ERRNO_TABLE says: for stage handshake where a connected peer keeps silent or
        says something else, for stage accept otherwise.
        """
        gate = self._gate
        code = drive(lambda: lib.nv_gate_admit(gate, guard.wait), guard)
        if code:
            silent = gate.npending and code in GUARD_VERDICTS
            raise errors.from_errno(
                code, Stage.HANDSHAKE if silent or gate.talked else Stage.ACCEPT
            )
        gate.admitted = 0
        return int(gate.admitted_fd), int(gate.opening_sent)

    @property
    def peer(self) -> PeerInfo:
        """The admitted peer, or the one a strict gate refused."""
        peer = self._gate.peer
        return PeerInfo(peer.family, peer.cid, peer.port, peer.pid, peer.uid, peer.gid)

    @property
    def refused(self) -> dict[str, int]:
        """Strangers by reason."""
        gate = self._gate
        return {
            "cid": gate.refused_cid,
            "ready": gate.refused_ready,
            "closed": gate.refused_closed,
            "crowded": gate.refused_crowded,
        }


def accept(listen_fd: int) -> tuple[int, PeerInfo] | None:
    """Accept a connection that waits already; None where none does.

    The descriptor is the caller's, and does not block. Raises what ERRNO_TABLE says for stage
    services.
    """
    peer = ffi.new("struct nv_peer *")
    out = ffi.new("int32_t *", -1)
    while True:
        code = -lib.nv_accept(listen_fd, peer, out)
        if code == 0:
            return int(out[0]), PeerInfo(
                peer.family, peer.cid, peer.port, peer.pid, peer.uid, peer.gid
            )
        if out[0] >= 0:
            os.close(out[0])
        if code == errno.EAGAIN:
            return None
        if code != errno.EINTR:
            raise errors.from_errno(code, Stage.SERVICES)


def handshake(fd: int, ready: int, guard: Guard) -> None:
    """Exchange the ready byte as the connecting side."""
    sent = ffi.new("uint64_t *")
    code = drive(lambda: lib.nv_handshake(fd, ready, guard.wait, sent), guard)
    if code:
        raise errors.from_errno(code, Stage.HANDSHAKE)


def enlarge_sndbuf(fd: int, want: int) -> int:
    """Enlarge the send buffer towards `want` bytes; return what the kernel reports afterwards.

    A kernel that refuses is no error: the transfer only gets slower.
    """
    got = ffi.new("int32_t *")
    return int(got[0]) if lib.nv_enlarge_sndbuf(fd, want, got) == 0 else 0


def block_briefly(fd: int, usec: int) -> None:
    """Let sends wait in the kernel for `usec` at most; a kernel that refuses is no error."""
    lib.nv_block_briefly(fd, usec)
