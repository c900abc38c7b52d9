"""Owns: a process with sessions of enclaves in it, for whoever plays their guests.

    host_session.py CID COUNT BACKEND [UDS_PATH]

Says "ready" once COUNT sessions are bound, at CID, CID + 8 and so on, and "running" once the guests
of all are connected; ends when every program has. BACKEND: a Unix path. Without UDS_PATH: AF_VSOCK.
Must not know: who measures it.
"""

import sys
import threading
import time

from nitro_vsock import EnclaveArgsWriter, EnclaveSession, NetProxy, Rootfs
from nitro_vsock.errors import Stage

CIDS_APART = 8


def main(cid, count, backend, uds_path=None):
    """Run the sessions, each in a thread; a single one in this one."""
    sessions = [
        EnclaveSession(
            EnclaveArgsWriter(
                Rootfs.from_bytes(bytes(10_240)),
                "/bin/app",
                ["/bin/app"],
                ["A=1"],
                proxies=[NetProxy(backend)],
            ),
            int(cid) + CIDS_APART * number,
            uds_path=uds_path,
            peer_cid=None if uds_path else 1,
            preflight=False,
        )
        for number in range(int(count))
    ]
    print("ready", flush=True)

    def tell():
        while any(session.stage in (Stage.ACCEPT, Stage.SERVICES) for session in sessions):
            time.sleep(0.01)
        print("running", flush=True)

    threads = [threading.Thread(target=session.run_sync) for session in sessions[1:]]
    for thread in (threading.Thread(target=tell), *threads):
        thread.start()
    sessions[0].run_sync()
    for thread in threads:
        thread.join()
    for session in sessions:
        session.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
