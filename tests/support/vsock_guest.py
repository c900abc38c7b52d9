"""Owns: the guest stand-in of tests/guest as a process beside a test, and the AF_VSOCK fixtures.

Must not know: whether it runs in a VM or on a kernel that has loopback itself.
"""

import itertools
import json
import os
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest
from archives import make_tar

from nitro_vsock import EnclaveArgsWriter, Rootfs

SOURCE = Path(__file__).resolve().parent / "guest" / "guest.c"

LOOPBACK = 1
"""The CID every peer shows over vsock loopback."""

MIB = 1 << 20


_cids = itertools.count(2000, 10)


@pytest.fixture
def cid():
    """A CID whose ports no other test uses."""
    return next(_cids)


@pytest.fixture(scope="session")
def guest_binary(tmp_path_factory):
    """The guest stand-in, compiled."""
    binary = tmp_path_factory.mktemp("guest") / "guest"
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", SOURCE, "-o", binary, "-lz"]
    subprocess.run(command, check=True)
    return binary


class StandIn:
    """A guest stand-in that runs beside the test."""

    def __init__(self, binary, cid, options):
        """Start it; `options` are its long options, underscores for dashes."""
        command = [str(binary), f"--port={cid + 1}"]
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            command.append(flag if value is True else f"{flag}={value}")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self):
        """Its process id."""
        return self._process.pid

    def go(self):
        """Let it begin its next launch, where it was started with `told`."""
        self._process.stdin.write(".")
        self._process.stdin.flush()

    def next(self):
        """Wait for the end of its next launch; return what it says of it."""
        return json.loads(self._process.stdout.readline())

    def result(self):
        """Wait for its end; return what it says of its last launch."""
        out, _ = self._process.communicate(timeout=300)
        return json.loads(out.splitlines()[-1])

    def kill(self):
        """End it now, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def stand_in(guest_binary):
    """Start guest stand-ins; whatever is left of them is ended with the test."""
    started = []

    def start(cid, **options):
        started.append(StandIn(guest_binary, cid, options))
        return started[-1]

    yield start
    for guest in started:
        guest.kill()


@pytest.fixture(scope="session")
def small_tar(tmp_path_factory):
    """A real tar of 2 MiB: (path, CRC-32, size)."""
    data = make_tar(2 * MIB)
    path = tmp_path_factory.mktemp("rootfs") / "small.tar"
    path.write_bytes(data)
    return path, zlib.crc32(data), len(data)


@pytest.fixture(scope="session")
def big_rootfs(tmp_path_factory):
    """A tar of 1 GiB in which no two MiB are alike: (path, CRC-32, size)."""
    path = tmp_path_factory.mktemp("rootfs") / "big"
    size = 1024 * MIB
    header = tarfile.TarInfo("rootfs/big")
    header.size = size - 3 * tarfile.BLOCKSIZE  # itself, and the end of the archive
    block = bytearray(os.urandom(MIB))
    crc = 0
    with path.open("wb") as file:
        for number in range(size // MIB):
            block[:8] = number.to_bytes(8, "big")
            if number == 0:
                block[: tarfile.BLOCKSIZE] = header.tobuf(tarfile.GNU_FORMAT)
            if number == size // MIB - 1:
                block[-2 * tarfile.BLOCKSIZE :] = bytes(2 * tarfile.BLOCKSIZE)
            crc = zlib.crc32(block, crc)
            file.write(block)
    yield path, crc, size
    path.unlink()


@pytest.fixture
def small_writer(small_tar):
    """A writer of an ordinary small launch."""
    return EnclaveArgsWriter(
        Rootfs.from_file(small_tar[0]), "/bin/app", ["/bin/app", "a b"], {"PATH": "/bin"}
    )
