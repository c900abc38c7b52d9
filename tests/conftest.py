"""Owns: what every test gets: a short socket path, a rootfs, and the check that nothing leaked."""

import gc
import os
import signal
import tempfile
import threading

import faults
import pytest
from archives import Archive, make_tar
from hypothesis import HealthCheck, settings
from machine import CID, HAS_LOOPBACK, open_descriptors
from sessions import Place

from nitro_vsock import EnclaveArgsWriter, Rootfs

# Here, since a test takes the profile that is loaded when it is defined.
# No deadline: a loaded machine is no finding. In CI the same examples in every run.
settings.register_profile(
    "nitro_vsock",
    deadline=None,
    max_examples=300,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("nitro_vsock")

pytest_plugins = ["vsock_guest", "programs", "left_out"]


collect_ignore_glob = [] if HAS_LOOPBACK else ["vsock"]


def pytest_configure():
    """Take SIGINT as at a terminal: a shell starts what runs behind it with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def uds():
    """Base path of a hybrid vsock, short enough for sun_path."""
    with tempfile.TemporaryDirectory(prefix="nv") as folder:
        yield f"{folder}/v.sock"


@pytest.fixture
def guest_path(uds):
    """Where a guest with CID 16 connects for its arguments."""
    return f"{uds}_{CID + 1}"


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The compiled faults.c, to be preloaded."""
    return faults.build(tmp_path_factory.getbasetemp())


@pytest.fixture
def archive(tmp_path):
    """A tar of about 1 MiB in a file."""
    data = make_tar(1 << 20)
    path = tmp_path / "rootfs.tar"
    path.write_bytes(data)
    return Archive(path, data)


@pytest.fixture
def writer(archive):
    """A writer of an ordinary launch."""
    return EnclaveArgsWriter(
        Rootfs.from_file(archive.path), "/bin/app", ["/bin/app", "a b"], {"PATH": "/bin", "A": "1"}
    )


@pytest.fixture(autouse=True)
def nothing_leaks():
    """After each test: no descriptor, thread, child or changed signal mask more than before."""
    gc.collect()
    gc.freeze()  # what pytest keeps of the tests before is not looked through again and again
    before = open_descriptors()
    threads = set(threading.enumerate())
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
    gc.collect()
    assert set(threading.enumerate()) <= threads, "a thread was left"
    leaked = {fd: what for fd, what in open_descriptors().items() if before.get(fd) != what}
    assert not leaked, f"descriptors were left: {leaked}"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask, "the signal mask was changed"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def place(uds):
    """Where sessions meet their guests; test_vsock_session.py has another."""
    return Place(CID, uds)
