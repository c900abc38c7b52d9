"""Owns: launches from as many threads as there are addresses. many.py ARCHIVE ADDRESS..."""

import sys
from concurrent.futures import ThreadPoolExecutor

from nitro_vsock import EnclaveArgsWriter, Rootfs, protocol
from nitro_vsock.cli.compare import senders


def main(archive, *addresses):
    """Listen everywhere, then send everywhere."""
    writer = EnclaveArgsWriter(
        Rootfs.from_file(archive),
        senders.EXEC_PATH,
        list(senders.ARGV),
        list(senders.ENVP),
        network_proxy=True,
        app_output=True,
    )
    launches = [
        writer.listen(cid, uds_path=base, peer_cid=protocol.VMADDR_CID_ANY, preflight=False)
        for cid, base in map(senders.cid_and_base, addresses)
    ]
    with ThreadPoolExecutor(len(launches)) as pool:
        list(pool.map(lambda launch: launch.send(timeout=600.0), launches))
    for launch in launches:
        launch.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
