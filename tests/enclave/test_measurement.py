"""PCR16 and PCR17, read back from the security module, are what `measure` predicted."""

import hashlib
import io
import random
import subprocess
import sys
import tarfile

import pytest
from enclave import eif
from enclave.bed import CMDLINE
from enclave.test_launch import docker_export
from enclave.trees import Tar, launch, writer_of

from nitro_vsock import Rootfs

BIG = 100 << 20
MANY = 20_000


def agreed(machine, writer):
    """Whether a launch ends with both registers as predicted; the guest measures before it runs."""
    told = writer.measure()
    assert launch(machine, writer).returncode == 0
    machine.wait()
    seen = machine.registers()
    return (seen["PCR16"], seen["PCR17"]) == (told.pcr16.hex(), told.pcr17.hex())


def test_directory(real_enclave, tree):
    """With names in UTF-8, hard links, empty files, links, and `etc/hosts*`, which are left out."""
    (tree / "etc").mkdir()
    for name in ("hosts", "hosts.allow", "hostname", "hostname.old", "é"):
        (tree / "etc" / name).write_bytes(name.encode() * 700)
    (tree / "empty").touch()
    (tree / "hard").hardlink_to(tree / "etc" / "é")
    (tree / "soft").symlink_to("empty")
    (tree / "chunk").write_bytes(bytes(2048))
    (tree / "more").write_bytes(bytes(2049))
    assert agreed(real_enclave, writer_of(Rootfs.from_directory(tree), "exit", "0"))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_plain_tar(real_enclave, probe, form):
    """Of each format; the names left out lie in other directories too."""
    tar = Tar(probe, form).add("etc/hosts", b"x").add("a/rootfs/etc/hosts.b", b"y" * 5000)
    tar.add("empty").add("data", random.Random(1).randbytes(10_001)).hard("hard", "data")
    assert agreed(real_enclave, writer_of(Rootfs.from_bytes(tar.bytes()), "exit", "0"))


def test_docker_export(real_enclave, tmp_path, probe):
    """A foreign tar, whose headers are made anew while it is sent."""
    path = tmp_path / "export.tar"
    path.write_bytes(docker_export(probe))
    assert agreed(real_enclave, writer_of(Rootfs.from_tar(path), "exit", "0"))


def test_file_of_100_mib_and_the_limit_of_unpacking(real_enclave, tree, record_property):
    """Agreed; the guest's own clock says how fast it measures and unpacks."""
    (tree / "big").write_bytes(random.Random(2).randbytes(BIG))
    assert agreed(real_enclave, writer_of(Rootfs.from_directory(tree), "exit", "0"))
    said = real_enclave.wait_for(r"unpacked bytes=(\d+) measured=\d+ seconds=([\d.]+)")
    rate = int(said[1]) / float(said[2])
    record_property("unpack_rate_mib", rate / (1 << 20))
    # SessionTimeouts.services allows a second for each 4 MiB, and a minute.
    assert float(said[2]) < 60 + int(said[1]) / (4 << 20)


def test_20000_files(real_enclave, tree):
    """Each is a chunk of its own."""
    for number in range(MANY):
        folder = tree / f"d{number // 500}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{number}").write_bytes(b"%d" % number)
    assert agreed(real_enclave, writer_of(Rootfs.from_directory(tree), "exit", "0"))


def test_strings(real_enclave, tree):
    """PCR17 of long and non-ASCII strings, and of an exec_path that is not argv[0]."""
    argv = ["exit", "0", "é" * 1000, "x" * 4000]
    envp = {"PATH": "/bin", "A": "b c"}
    rootfs = Rootfs.from_directory(tree)
    assert agreed(real_enclave, writer_of(rootfs, *argv, envp=envp, exec_path="/bin/other"))


def test_1_gib_in_flat_memory(real_enclave, tree):
    """The host's process stays below 64 MiB more; the guest's digest is that of what was sent."""
    with (tree / "huge").open("wb") as file:
        digest, block = 0, random.Random(3).randbytes(1 << 20)
        import zlib

        for number in range(1024):
            piece = number.to_bytes(8, "big") + block[8:]
            digest = zlib.crc32(piece, digest)
            file.write(piece)
    where = ["--cid", str(real_enclave.cid), "--uds-path", real_enclave.uds_path]
    script = (
        "import resource, sys\n"
        "from nitro_vsock.cli import main\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    main()\n"
        "finally:\n"
        "    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "    print('KIB', more, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script, "host", *where, "--rootfs", str(tree)]
    command += ["--env", "PATH=/bin", "--timeout", "200", "--", "/bin/probe", "digest", "/huge"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as host:
        try:
            line = host.stderr.readline()
            while line and b"listening" not in line:
                line = host.stderr.readline()
            real_enclave.boot(nsm=False, memory="5G")
            output, noise = host.communicate(timeout=280)
        finally:
            host.kill()
    assert host.returncode == 0, noise
    assert output == b"%08x %d\n" % (digest, 1 << 30)
    assert int(noise.split(b"KIB ")[1].split()[0]) <= 64 << 10


def test_image_is_reproducible(bed):
    """The packer gives the same bytes, and registers by the formula of two digests."""
    line, disks = CMDLINE.encode(), (eif.cpio({"a/b": eif.File(b"x")}), eif.cpio({}))
    first, again = (eif.pack(bed.kernel, line, disks) for _ in range(2))
    assert first == again
    inner = hashlib.sha384(disks[1]).digest()
    expected = hashlib.sha384(bytes(48) + inner).hexdigest()
    assert eif.registers(bed.kernel, line, disks)["PCR2"] == expected
    assert io.BytesIO(first).read(4) == b".eif"
