"""Sessions that have nothing to do do nothing, for a window of ten seconds, as was asked for."""

import contextlib
import socket
import threading
import time
from pathlib import Path

from peer import Guest, connect, wait_until

from nitro_vsock import EnclaveArgsWriter, EnclaveSession, NetProxy, OutputProxy, Rootfs
from nitro_vsock.errors import Stage

SECONDS = 10
MANY = 64
CID = 16
MTU = (1514).to_bytes(4, "big")
FRAME = (9).to_bytes(4, "big") + b"one frame"


def times_on_a_processor(threads):
    """Return how often the kernel has let threads run: none makes a system call without."""
    return [
        int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[2])
        for thread in threads
    ]


def test_idle_sessions_never_run(uds):
    """64 sessions in their run phase, with network and output: no thread is woken once."""
    with contextlib.ExitStack() as stack:
        sessions, threads, connections = [], [], []
        for cid in range(CID, CID + 8 * MANY, 8):
            backend, other = (stack.enter_context(end) for end in socket.socketpair())
            writer = EnclaveArgsWriter(
                Rootfs.from_bytes(bytes(10_240)),
                "/bin/app",
                ["/bin/app"],
                ["A=1"],
                proxies=[NetProxy(backend), OutputProxy(lambda _: None)],
            )
            session = EnclaveSession(writer, cid, uds_path=uds, preflight=False)
            sessions.append(stack.enter_context(session))
            threads.append(threading.Thread(target=session.run_sync, daemon=True))
            threads[-1].start()
            Guest(f"{uds}_{cid + 1}").result()
            opened = [stack.enter_context(connect(f"{uds}_{cid + port}")) for port in (3, 2, 5)]
            other.settimeout(20)
            opened[1].sendall(MTU + FRAME)
            assert other.recv(100) == FRAME
            connections.append(opened)
        wait_until(lambda: all(s.stage is Stage.RUN for s in sessions), what="the run phase")
        wait_until(lambda: is_still(threads), what="silence")
        before = times_on_a_processor(threads)
        time.sleep(SECONDS)
        assert times_on_a_processor(threads) == before
        for cid, opened in zip(range(CID, CID + 8 * MANY, 8), connections, strict=True):
            opened[0].close()
            with connect(f"{uds}_{cid + 4}") as code:
                code.sendall(bytes(4))
                code.recv(4)
            for sock in opened:
                sock.close()
        for thread in threads:
            thread.join(20)


def is_still(threads):
    """Whether no thread runs within a moment, and none waits for a processor."""
    before = times_on_a_processor(threads)
    time.sleep(0.1)
    return times_on_a_processor(threads) == before and all(map(is_asleep, threads))


def is_asleep(thread):
    """Whether a thread waits for something else than a processor."""
    stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    return stat.rpartition(") ")[2][0] == "S"
