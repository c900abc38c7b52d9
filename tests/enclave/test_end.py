"""How a session with a real enclave ends: by SIGTERM, by the enclave's death, by a deadline."""

import io
import threading
import time

import pytest
from enclave.trees import launch, writer_of

from nitro_vsock import (
    DeadlineError,
    EnclaveDiedError,
    EnclaveSession,
    NitroVsockError,
    Rootfs,
    SessionTimeoutError,
    SessionTimeouts,
    VsockBindError,
)


class Acting(io.RawIOBase):
    """An output that does something once, when the first bytes come."""

    def __init__(self, action):
        self._action = action
        self.at = None

    def writable(self):
        """It is written to."""
        return True

    def write(self, data):
        """Act at the first."""
        if self.at is None:
            self._action()
            self.at = time.monotonic()
        return len(data)


@pytest.mark.parametrize("how", ["wait", "ignore"])
def test_sigterm_is_forwarded(real_enclave, tree, how):
    """The deployed guest reports 0 then, whether the program ends or ignores it."""
    output = Acting(lambda: session.terminate())
    writer = writer_of(Rootfs.from_directory(tree), how, output=output)
    with EnclaveSession(writer, real_enclave.cid, **real_enclave.host_options) as session:
        real_enclave.boot()
        status = session.run_sync(enclave_fd=real_enclave.fileno())
    assert status.terminated
    assert status.returncode == 0


def test_stop_timeout(real_enclave, tree):
    """A guest that waits for its program, which ignores SIGTERM: the deadline ends the session."""
    output = Acting(lambda: session.terminate())
    writer = writer_of(Rootfs.from_directory(tree), "ignore", output=output)
    timeouts = SessionTimeouts(stop=1.0)
    where = real_enclave.host_options
    with EnclaveSession(writer, real_enclave.cid, timeouts=timeouts, **where) as session:
        real_enclave.boot("guest.flavour=rust-init")
        with pytest.raises(SessionTimeoutError):
            session.run_sync(enclave_fd=real_enclave.fileno())
    assert 1 <= time.monotonic() - output.at < 3


@pytest.mark.parametrize("stage", ["boot", "connected", "header", "payload", "finished"])
def test_enclave_that_dies(real_enclave, tree, stage):
    """QEMU is killed at each stage: a typed error within a second."""
    (tree / "ballast").write_bytes(bytes(3 << 20))
    writer = writer_of(Rootfs.from_directory(tree))
    died = []

    def kill():
        real_enclave.wait_for("stalls")
        died.append(time.monotonic())
        real_enclave.kill()

    with EnclaveSession(writer, real_enclave.cid, **real_enclave.host_options) as session:
        real_enclave.boot(f"guest.stall={stage}")
        thread = threading.Thread(target=kill)
        thread.start()
        try:
            with pytest.raises(NitroVsockError):
                session.run_sync(enclave_fd=real_enclave.fileno())
            ended = time.monotonic()
        finally:
            thread.join()
    assert ended - died[0] < 1


def test_enclave_that_dies_while_output_flows(real_enclave, tree):
    """The same, in the middle of the program's output."""
    output = Acting(real_enclave.kill)
    with pytest.raises(EnclaveDiedError):
        launch(real_enclave, writer_of(Rootfs.from_directory(tree), "flow", output=output))
    assert time.monotonic() - output.at < 1


def test_deadline_that_passes_while_the_kernel_boots(real_enclave, tree):
    """The launch's deadline is kept, whatever the enclave does."""
    timeouts = SessionTimeouts(launch=0.2)
    began = time.monotonic()
    with pytest.raises(DeadlineError):
        launch(real_enclave, writer_of(Rootfs.from_directory(tree)), timeouts=timeouts)
    assert time.monotonic() - began < 2


def test_guest_that_never_connects(real_enclave, tree):
    """It is up, and says nothing: the deadline ends the launch."""
    writer = writer_of(Rootfs.from_directory(tree))
    timeouts = SessionTimeouts(launch=0.5)
    where = real_enclave.host_options
    with EnclaveSession(writer, real_enclave.cid, timeouts=timeouts, **where) as session:
        real_enclave.boot("guest.stall=boot")
        real_enclave.wait_for("stalls")
        with pytest.raises(DeadlineError):
            session.run_sync(enclave_fd=real_enclave.fileno())


@pytest.mark.parametrize("apart", [4, 5])
def test_two_enclaves_at_once(machine_of, tree, apart):
    """Each is a host of its own where paths differ, 4 CIDs apart and 5."""
    codes = {}

    def run(machine, code):
        writer = writer_of(Rootfs.from_directory(tree), "exit", str(code))
        codes[code] = launch(machine, writer).returncode

    machines = [machine_of(16), machine_of(16 + apart)]
    threads = [
        threading.Thread(target=run, args=(machine, code))
        for machine, code in zip(machines, (3, 4), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {3: 3, 4: 4}


def test_two_hosts_4_apart_at_one_path(real_enclave, tree):
    """Where they share a path they share a port, and the second is refused before it boots."""
    writer = writer_of(Rootfs.from_directory(tree))
    where = real_enclave.host_options
    with EnclaveSession(writer, 16, **where):
        with pytest.raises(VsockBindError):
            EnclaveSession(writer, 20, **where)
        EnclaveSession(writer, 21, **where).close()
