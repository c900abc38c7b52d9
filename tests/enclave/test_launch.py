"""What a program in a real enclave sees of its launch, and what the host sees of the program."""

import io
import json
import subprocess
import sys
import tarfile

import pytest
from enclave.trees import ENVIRONMENT, PROBE, Tar, launch, writer_of

from nitro_vsock import EnclaveArgsWriter, Rootfs

FLOOD = 16 << 20


def pattern(size):
    """Return what `probe flood` writes."""
    words = range(0, size, 8)
    return b"".join((at * 0x9E3779B97F4A7C15 % (1 << 64)).to_bytes(8, "little") for at in words)


def docker_export(probe):
    """Return a tar as `docker export` makes it: no rootfs/, and the directories of a container."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "run"):
            member = tarfile.TarInfo(f"{name}/")
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        files = {".dockerenv": b"", "bin/probe": probe, "etc/hostname": b"0123456789ab\n"}
        files |= {"etc/hosts": b"127.0.0.1\n", "dev/console": b"", "etc/ünï": b"\xff" * 5000}
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(data), 0o755, 1700000000.25
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("source", ["file", "directory", "docker export"])
def test_launch_from(real_enclave, source, tmp_path, tree, probe):
    """The program runs, its exit code comes back, all five registers are as predicted."""
    if source == "directory":
        rootfs = Rootfs.from_directory(tree)
    else:
        path = tmp_path / "rootfs.tar"
        path.write_bytes(Tar(probe).bytes() if source == "file" else docker_export(probe))
        rootfs = Rootfs.from_file(path) if source == "file" else Rootfs.from_tar(path)
    output = io.BytesIO()
    writer = writer_of(rootfs, "hello", output=output)
    status = launch(real_enclave, writer)
    assert (status.returncode, output.getvalue()) == (0, b"hello from the enclave\n")
    real_enclave.wait()
    registers = real_enclave.registers()
    told = writer.measure()
    assert registers["PCR16"] == told.pcr16.hex()
    assert registers["PCR17"] == told.pcr17.hex()
    for name, value in real_enclave.image.registers.items():
        assert registers[name] == value, name


@pytest.mark.parametrize("code", [0, 7, 127, 255])
def test_exit_code(judge, probe, code):
    """It arrives as the program gave it."""
    outcome = judge.run(Rootfs.from_bytes(Tar(probe).bytes()), "exit", str(code))
    assert outcome.status.returncode == code


@pytest.mark.parametrize("number", [6, 9, 11, 15])
def test_signal_that_ends_the_program(judge, probe, number):
    """It is told from an exit code."""
    outcome = judge.run(Rootfs.from_bytes(Tar(probe).bytes()), "die", str(number))
    assert outcome.status.returncode == -number


def test_output_of_16_mib_is_unchanged(judge, probe):
    """Standard output and standard error, in turns, byte for byte and in order."""
    outcome = judge.run(Rootfs.from_bytes(Tar(probe).bytes()), "flood", str(FLOOD))
    assert outcome.output == pattern(FLOOD)
    assert outcome.status.output_complete


def shown(output):
    """Return what `probe show` says: arguments, environment, working directory."""
    parts = output.split(b"\0")
    cut = parts.index(b"")
    return parts[:cut], parts[cut + 1 : -3], parts[-2]


def test_arguments_and_environment_arrive_exact(judge, probe):
    """Spaces, quotes, UTF-8, newlines and 4,000 bytes; the order, and the working directory."""
    arguments = [
        "show",
        "a b",
        'it\'s "quoted"',
        "$HOME `id` \\n",
        "naïve 日本 🎉",
        "a\nb\t",
        "x" * 4000,
    ]
    environment = {
        **ENVIRONMENT,
        "SPACED": "a b ",
        "EQUALS": "a=b=c",
        "UNI": "é",
        "LONG": "y" * 3900,
    }
    rootfs = Rootfs.from_bytes(Tar(probe).bytes())
    outcome = judge.run(rootfs, *arguments, envp=environment)
    argv, envp, folder = shown(outcome.output)
    assert argv == [word.encode() for word in [PROBE, *arguments]]
    assert envp == [f"{name}={value}".encode() for name, value in environment.items()]
    assert folder == b"/"


def test_empty_arguments_arrive(judge, probe):
    """An empty string is one; preflight only warns of it."""
    outcome = judge.run(Rootfs.from_bytes(Tar(probe).bytes()), "show", "a")
    assert shown(outcome.output)[0][1:] == [b"show", b"a"]


def test_program_is_found_by_path(judge, probe):
    """A name without a slash is looked for in PATH, wherever it stands in the environment."""
    rootfs = Rootfs.from_bytes(Tar(probe).bytes())
    writer = EnclaveArgsWriter(
        rootfs, PROBE, ["probe", "exit", "9"], {"A": "1", "PATH": "/sbin:/bin"}
    )
    assert judge.try_out(writer).status.returncode == 9


def test_missing_program(judge, probe):
    """Preflight refuses it; the guest reports what its exec failed with: 254 for ENOENT."""
    rootfs = Rootfs.from_bytes(Tar(probe).bytes())
    writer = EnclaveArgsWriter(rootfs, "/bin/none", ["/bin/none"], ENVIRONMENT)
    assert [finding.code for finding in writer.preflight()] == ["program-missing"]
    assert judge.try_out(writer).status.returncode == 254


def test_modes_after_unpacking(judge, probe):
    """Set-id, sticky and others' write bits are lost, hard links stay, the rest survives."""
    tar = Tar(probe).add("a", b"x", 0o666).add("s", b"x", 0o4755).folder("t", 0o1777).hard("h", "a")
    outcome = judge.run(Rootfs.from_bytes(tar.bytes()), "modes", "/a", "/s", "/t")
    assert outcome.output == b"100644 2\n100755 1\n40755 2\n"


# Every way of being the host, once each


def test_command_host(real_enclave, tree):
    """`nitro-vsock host` shows the output and exits with the program's code."""
    where = ["--cid", str(real_enclave.cid), "--uds-path", real_enclave.uds_path]
    command = [sys.executable, "-m", "nitro_vsock", "host", *where, "--rootfs", str(tree)]
    command += ["--env", "PATH=/bin", "--", PROBE, "exit", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as host:
        try:
            line = host.stderr.readline()
            while line and b"listening" not in line:
                line = host.stderr.readline()
            real_enclave.boot()
            output, noise = host.communicate(timeout=90)
        finally:
            host.kill()
    assert (host.returncode, output) == (5, b""), noise


def test_command_send(real_enclave, tree):
    """`nitro-vsock send` hands the launch over; the guest takes it whole."""
    where = ["--cid", str(real_enclave.cid), "--uds-path", real_enclave.uds_path]
    command = [sys.executable, "-m", "nitro_vsock", "send", *where, "--rootfs", str(tree), "--json"]
    command += ["--env", "PATH=/bin", "--", PROBE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as host:
        try:
            line = host.stderr.readline()
            while line and b"listening" not in line:
                line = host.stderr.readline()
            real_enclave.boot()
            output, noise = host.communicate(timeout=90)
        finally:
            host.kill()
    assert host.returncode == 0, noise
    assert json.loads(output)
    real_enclave.wait_for("entered")


def test_asyncio_session(real_enclave, tree):
    """`await session.run()` is the same."""
    import asyncio

    from nitro_vsock import EnclaveSession

    async def main():
        writer = writer_of(Rootfs.from_directory(tree), "exit", "4")
        with EnclaveSession(writer, real_enclave.cid, **real_enclave.host_options) as session:
            real_enclave.boot()
            return await session.run(enclave_fd=real_enclave.fileno())

    assert asyncio.run(main()).returncode == 4
