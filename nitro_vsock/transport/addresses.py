"""Owns: addresses and peers. Must not know: descriptors."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Final, Union

from nitro_vsock.core import PeerInfo
from nitro_vsock.errors import InvalidArgumentError
from nitro_vsock.protocol import VMADDR_CID_ANY

PathLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]

MAX_UNIX_PATH: Final = 107
"""Bytes of a Unix socket's path: `sun_path` less its NUL (unix(7))."""


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
    def _from(cls, info: PeerInfo) -> Peer:
        if info.family == socket.AF_VSOCK:
            return cls(cid=info.cid, port=info.port)
        return cls(pid=info.pid, uid=info.uid, gid=info.gid)

    def __str__(self) -> str:
        if self.cid is not None:
            return f"CID {self.cid} port {self.port}"
        return f"pid {self.pid} uid {self.uid}"
