"""Owns: every number of the launch protocol: frame ids, ready byte, port offsets, limits.

Must not know: how frames are built, how bytes move.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

READY: Final = 0xB7
"""The byte guest and host exchange before the first frame."""

LENGTH: Final = struct.Struct("=Q")
"""Every length and count on the wire: native-endian u64."""


class FrameId(IntEnum):
    """First byte of a frame. Names follow the reference's `EnclaveArg`."""

    ROOT_FILESYSTEM = 0
    EXEC_PATH = 1
    EXEC_ARGV = 2
    EXEC_ENVP = 3
    NETWORK_PROXY = 4
    APP_OUTPUT = 5
    FINISHED = 255


class VsockPortOffset(IntEnum):
    """What a service's port is above the enclave's CID."""

    ARGS_READER = 1
    NET = 2
    APP_OUTPUT = 3
    RETURN_CODE = 4
    SIGNAL_HANDLER = 5
    CONSOLE = 10000
    """Bound by the hypervisor: the host connects to CID 0."""


VMADDR_CID_ANY: Final = 0xFFFFFFFF
"""`linux/vm_sockets.h`: any CID."""
VMADDR_CID_HYPERVISOR: Final = 0
"""`linux/vm_sockets.h`: where the console of an enclave in debug mode is."""
VMADDR_CID_LOCAL: Final = 1
"""`linux/vm_sockets.h`: loopback, Linux 5.6 and later."""
VMADDR_CID_HOST: Final = 2
"""`linux/vm_sockets.h`: the host, as its guests see it."""

MIN_CID: Final = 3
"""CIDs 0, 1 and 2 are the hypervisor's, loopback's and the host's."""
MAX_CID: Final = 0xFFFFFFFE - VsockPortOffset.SIGNAL_HANDLER
"""Above it, the port of a service the guest connects to would pass 0xFFFFFFFE, the last port."""

U64_MAX: Final = (1 << 64) - 1

MAX_STRING_BYTES: Final = 4000
"""A path, argv or envp string without its NUL. The guest measures each with one request to the
Nitro Secure Module, which takes 4096 bytes with its CBOR wrapper."""

PACKET_LIMIT: Final = 3584
"""Bytes of a send that carries lengths. Guests receive into buffers of about 4 KiB, and a length
that two packets share is read short, which ends the launch."""

MIN_PACKET: Final = 64
"""Smallest send worth making: some guest kernels drop data under a flood of tiny packets."""

ARGUMENTS_LIMIT: Final = 256 * 1024
"""Bytes of all frames before the root file system's payload. It is the receive window a Linux
guest grants by default (`VIRTIO_VSOCK_DEFAULT_BUF_SIZE`); past it the kernel may send part of a
length and hold back the rest."""

ROOTFS_PREFIX: Final = "rootfs"
"""Directory every member of the archive lies under."""

FORBIDDEN_TOP: Final = frozenset({"dev", "proc", "run", "sys", "tmp"})
"""Names the archive must not have right under ROOTFS_PREFIX: the guest makes them itself, and stops
where they exist."""
