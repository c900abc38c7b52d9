"""Owns: what every test gets: a short socket path, a rootfs, and the check that nothing leaked."""

import gc
import hashlib
import io
import os
import signal
import tarfile
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from nitro_vsock import EnclaveArgsWriter, Rootfs

CID = 16


@dataclass
class Archive:
    """A real tar under rootfs/, and its digest."""

    path: Path
    data: bytes

    @property
    def sha256(self):
        """Digest in hex."""
        return hashlib.sha256(self.data).hexdigest()


def make_tar(size):
    """Return a plain GNU tar of about `size` bytes whose data has no pattern to get lost in."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        data = os.urandom(max(size - 10240, 1))
        member = tarfile.TarInfo("rootfs/data")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def uds():
    """Base path of a hybrid vsock, short enough for sun_path."""
    with tempfile.TemporaryDirectory(prefix="nv") as folder:
        yield f"{folder}/v.sock"


@pytest.fixture
def guest_path(uds):
    """Where a guest with CID 16 connects for its arguments."""
    return f"{uds}_{CID + 1}"


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


def open_descriptors():
    """Return {fd: what it is} of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own descriptor
    return found


@pytest.fixture(autouse=True)
def nothing_leaks():
    """After each test: no descriptor, thread, child or changed signal mask more than before."""
    gc.collect()
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
