"""Owns: where the services of an enclave are, and the checks of what names an enclave.

Must not know: launches.
"""

from __future__ import annotations

import os

from nitro_vsock import protocol
from nitro_vsock.errors import InvalidArgumentError, require_int
from nitro_vsock.transport import Address, PathLike, UnixAddress, VsockAddress


def service_address(
    cid: int, service: protocol.VsockPortOffset, uds_path: PathLike | None = None
) -> Address:
    """Return where the host listens for a service of the enclave with this CID.

    Args:
        cid: the enclave's.
        service: which.
        uds_path: the base path of a hybrid vsock; a guest's connect to port P arrives at
            `<uds_path>_P` (Firecracker's convention). AF_VSOCK by default.

    Raises:
        InvalidArgumentError: a CID outside MIN_CID to MAX_CID, or a path that gets too long.
    """
    reason = "0, 1 and 2 are reserved, and ports CID + 1 to CID + 5 must exist"
    port = require_int("cid", cid, protocol.MIN_CID, protocol.MAX_CID, reason) + service
    if uds_path is None:
        return VsockAddress(protocol.VMADDR_CID_ANY, port)
    try:
        return UnixAddress(f"{os.fsdecode(uds_path)}_{port}")
    except TypeError:
        raise InvalidArgumentError("uds_path", uds_path, "must be a path") from None


def check_peer_cid(cid: int) -> int | None:
    """Return the CID to admit, None for any.

    Raises:
        InvalidArgumentError: it is no CID.
    """
    require_int("peer_cid", cid, 0, protocol.VMADDR_CID_ANY)
    return None if cid == protocol.VMADDR_CID_ANY else cid


def check_enclave_fd(fd: int | None) -> int:
    """Return what to watch, -1 for None; to the core a closed one would look like a dead enclave.

    Raises:
        InvalidArgumentError: it is no open descriptor.
    """
    if fd is None:
        return -1
    require_int("enclave_fd", fd, 0, (1 << 31) - 1)
    try:
        os.fstat(fd)
    except OSError as error:
        limit = f"must be an open descriptor ({error.strerror})"
        raise InvalidArgumentError("enclave_fd", fd, limit) from None
    return fd


def bind_hint(cid: int, address: Address) -> str:
    """Return what may be the matter where an address of an enclave cannot be bound."""
    if isinstance(address, UnixAddress):
        return (
            f"for an enclave of CID {cid}; a process listens there, or the file is no socket: "
            "what a killed process left is replaced"
        )
    sharing = ", ".join(
        f"{service.name.lower().replace('_', ' ')} of CID {address.port - service}"
        for service in protocol.VsockPortOffset
        if service is not protocol.VsockPortOffset.CONSOLE
    )
    return (
        f"port {address.port} is {sharing}: enclaves need CIDs at least 5 apart; and ports up to "
        "1023 need CAP_NET_BIND_SERVICE"
    )
