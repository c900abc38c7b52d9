"""Owns: a row of small launches, by the package or a plain script; each says that it listens.

small.py nitro_vsock|PLAIN ADDRESS ARCHIVE COUNT
"""

import os
import socket
import sys
from pathlib import Path

from nitro_vsock import protocol
from nitro_vsock.cli.compare import senders


def with_the_package(address, archive, count):
    """Launch with a writer that is made once, as a launcher would."""
    from nitro_vsock import EnclaveArgsWriter, Rootfs

    cid, base = senders.cid_and_base(address)
    writer = EnclaveArgsWriter(
        Rootfs.from_file(archive),
        senders.EXEC_PATH,
        list(senders.ARGV),
        list(senders.ENVP),
        network_proxy=True,
        app_output=True,
    )
    for _ in range(count):
        anybody = {"uds_path": base, "peer_cid": protocol.VMADDR_CID_ANY}
        with writer.listen(cid, preflight=False, **anybody) as launch:
            os.write(1, b".")
            launch.send(timeout=30.0)


def plainly(address, archive, count):
    """Launch with nothing but sockets and bytes that are ready before."""
    family, where = senders.parse_address(address)
    data = Path(archive).read_bytes()
    stream = senders.head(len(data)) + data + senders.TAIL
    for _ in range(count):
        with socket.socket(family) as listener:
            listener.bind(where)
            listener.listen(1)
            os.write(1, b".")
            guest, _ = listener.accept()
        if family == socket.AF_UNIX:
            os.unlink(where)
        with guest:
            guest.recv(1)
            guest.sendall(stream)
            guest.recv(1)


if __name__ == "__main__":
    run = with_the_package if sys.argv[1] == "nitro_vsock" else plainly
    run(sys.argv[2], sys.argv[3], int(sys.argv[4]))
