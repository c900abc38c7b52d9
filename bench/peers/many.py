"""Owns: launches from as many threads as there are ports. many.py BASE ARCHIVE PORT..."""

import sys
from concurrent.futures import ThreadPoolExecutor

from nitro_vsock import EnclaveArgsWriter, Rootfs, VsockPortOffset
from nitro_vsock.cli import senders


def main(base, archive, *ports):
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
        writer.listen(int(port) - VsockPortOffset.ARGS_READER, uds_path=base, preflight=False)
        for port in ports
    ]
    with ThreadPoolExecutor(len(launches)) as pool:
        list(pool.map(lambda launch: launch.send(timeout=600.0), launches))
    for launch in launches:
        launch.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
