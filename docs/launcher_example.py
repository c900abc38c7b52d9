"""A complete launcher of Nitro enclaves: boots one, is its host, exits with its program's code.

Owns: the ioctls. Must not know: anything of what goes over vsock.
"""

import fcntl
import os
import struct
import sys

from nitro_vsock import (
    EnclaveArgsWriter,
    EnclaveSession,
    NetProxy,
    NitroVsockError,
    OutputProxy,
    Rootfs,
    SessionTimeouts,
    poll_timeout,
)

NE_CREATE_VM, NE_ADD_VCPU = 0x8008AE20, 0xC004AE21  # linux/nitro_enclaves.h
NE_SET_USER_MEMORY_REGION, NE_START_ENCLAVE = 0x4018AE23, 0xC010AE24


class NitroEnclave:
    """An enclave of /dev/nitro_enclaves; its memory must hold the image already."""

    def __init__(self, vcpus, regions):
        """`regions`: (flags, bytes, address) of each hugepage-backed piece of memory."""
        with open("/dev/nitro_enclaves", "rb") as device:
            self.fd = fcntl.ioctl(device, NE_CREATE_VM, bytearray(8))
        for region in regions:
            fcntl.ioctl(self.fd, NE_SET_USER_MEMORY_REGION, struct.pack("=QQQ", *region))
        for _ in range(vcpus):
            fcntl.ioctl(self.fd, NE_ADD_VCPU, struct.pack("=I", 0))

    def start(self, cid):
        """Boot it; a hang-up of the descriptor it returns says that it is gone."""
        fcntl.ioctl(self.fd, NE_START_ENCLAVE, struct.pack("=QQ", 0, cid))
        return self.fd

    def close(self):
        """End it."""
        os.close(self.fd)


def launch(enclave, cid, rootfs, argv, *, net=None, eif_bytes=1, memory_bytes=1, **where):
    """Be the host of an enclave until its program has ended; return the program's status."""
    writer = EnclaveArgsWriter(
        Rootfs.from_directory(rootfs),
        exec_path=argv[0],
        argv=argv,
        envp={"PATH": "/usr/bin:/bin"},
        proxies=[OutputProxy(1), *([NetProxy(net)] if net else [])],
    )
    timeouts = SessionTimeouts(launch=poll_timeout(eif_bytes, memory_bytes))
    try:
        with EnclaveSession(writer, cid, timeouts=timeouts, **where) as session:  # all bound
            enclave_fd = enclave.start(cid)
            return session.run_sync(enclave_fd=enclave_fd)
    except NitroVsockError as error:
        print(f"launch failed: {error}", *error.last_output, sep="\n", file=sys.stderr)
        raise
    finally:
        enclave.close()
