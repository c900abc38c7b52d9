"""Owns: the senders that `nitro-vsock bench` compares, and a reader; each runs in its own process.

    python -m nitro_vsock.cli.senders SENDER ADDRESS ARCHIVE

A process says "ready", waits for a line, does its one launch and prints one line of JSON; the
last is all that the reader says.

Must not know: who is compared with whom, or what the figures mean.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from nitro_vsock import protocol
from nitro_vsock.cli.compare.memory import PeakMemory
from nitro_vsock.launch import EnclaveArgsWriter
from nitro_vsock.rootfs import Rootfs
from nitro_vsock.wire import (
    AppOutput,
    EnclaveArg,
    ExecArgv,
    ExecEnvp,
    ExecPath,
    Finished,
    NetworkProxy,
    RootFilesystem,
    encode_packets,
)

EXEC_PATH: Final = b"/usr/bin/app"

ARGV: Final = (b"/usr/bin/app", b"--listen", b"a name with spaces")

ENVP: Final = (b"PATH=/usr/bin:/bin", b"MODE=bench")

READER: Final = "reader"

FOREIGN: Final = "foreign:"
"""In front of the path of a tar that another tool wrote, for us."""

SOCAT: Final = "socat"

TIMEOUT: Final = 600.0
"""Seconds for one launch."""

_CHUNK: Final = 1 << 20

_RETRY_SECONDS: Final = 0.001

NOBODY_THERE: Final = frozenset({errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET})


def head(rootfs_bytes: int) -> bytes:
    """Return all that a sender sends before the archive, the ready byte included."""
    args: list[EnclaveArg] = [
        NetworkProxy(),
        AppOutput(),
        ExecPath(EXEC_PATH),
        ExecArgv(ARGV),
        ExecEnvp(ENVP),
        RootFilesystem(rootfs_bytes),
    ]
    return bytes([protocol.READY]) + b"".join(encode_packets(args))


TAIL: Final = Finished().encode()
"""What a sender sends after the archive."""


def parse_address(address: str) -> tuple[socket.AddressFamily, str | tuple[int, int]]:
    """Return family and address of a `unix:PATH` or `vsock:CID:PORT`."""
    kind, _, rest = address.partition(":")
    if kind == "unix":
        return socket.AF_UNIX, rest
    cid, _, port = rest.partition(":")
    return socket.AF_VSOCK, (int(cid), int(port))


def cid_and_base(address: str) -> tuple[int, str | None]:
    """Return the CID, and the hybrid vsock's base path, with which we listen at an address.

    Args:
        address: a `unix:BASE_PORT` or `vsock:CID:PORT`, the CID any.
    """
    where = parse_address(address)[1]
    base, _, port = where.rpartition("_") if isinstance(where, str) else (None, None, where[1])
    return int(port) - protocol.VsockPortOffset.ARGS_READER, base


def _rootfs(what: str) -> Rootfs:
    if what.startswith(FOREIGN):
        return Rootfs.from_tar(what.removeprefix(FOREIGN))
    return Rootfs.from_directory(what) if Path(what).is_dir() else Rootfs.from_file(what)


def _ours(address: str, archive: str, strategy: str) -> float:
    writer = EnclaveArgsWriter(
        _rootfs(archive),
        EXEC_PATH,
        list(ARGV),
        list(ENVP),
        network_proxy=True,
        app_output=True,
    )
    cid, uds_path = cid_and_base(address)
    report = writer.write_args(
        cid,
        TIMEOUT,
        uds_path=uds_path,
        peer_cid=protocol.VMADDR_CID_ANY,
        strategy=strategy,
        preflight=False,  # what is sent stands for an archive
    )
    return sum(report.seconds.values()) - report.seconds["accept"]


def _plainly(address: str, archive: str, send: Callable[[socket.socket, BinaryIO], None]) -> float:
    """Do a launch as a script does that knows nothing of this package."""
    family, where = parse_address(address)
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind(where)
        listener.listen(1)
        guest, _ = listener.accept()
    if isinstance(where, str):
        Path(where).unlink()
    with guest, Path(archive).open("rb", buffering=0) as file:
        guest.recv(1)
        began = time.monotonic()
        guest.sendall(head(os.fstat(file.fileno()).st_size))
        send(guest, file)
        guest.sendall(TAIL)
        guest.recv(1)  # its end of stream
        return time.monotonic() - began


def _sendfile(guest: socket.socket, file: BinaryIO) -> None:
    guest.sendfile(file)


def _sendall(guest: socket.socket, file: BinaryIO) -> None:
    while chunk := file.read(_CHUNK):
        guest.sendall(chunk)


def _read(address: str, length: int) -> dict[str, int]:
    """Take a launch of `length` bytes after the ready byte, as fast as Python does."""
    family, where = parse_address(address)
    while True:
        host = socket.socket(family, socket.SOCK_STREAM)
        try:
            connected_ns = time.monotonic_ns()
            host.connect(where)
            break
        except OSError as error:
            host.close()
            if error.errno not in NOBODY_THERE:
                raise
        time.sleep(_RETRY_SECONDS)
    with host:
        with suppress(BrokenPipeError):  # socat waits for no ready byte: it may be done
            host.sendall(bytes([protocol.READY]))
        buffer = memoryview(bytearray(_CHUNK))
        received = len(host.recv(1)) - 1
        while received < length:
            got = host.recv_into(buffer)
            if not got:
                raise EOFError(f"the stream ended after {received} of {length} bytes")
            received += got
        finished_ns = time.monotonic_ns()
    return {"connected_ns": connected_ns, "finished_ns": finished_ns, "received": received}


def _socat(address: str, wire: str) -> float:
    """Let socat send a file that holds the whole stream."""
    kind, _, where = address.partition(":")
    listener = (
        f"UNIX-LISTEN:{where}" if kind == "unix" else f"VSOCK-LISTEN:{where.rpartition(':')[2]}"
    )
    began = time.monotonic()
    command = ["socat", "-u", "-b", str(_CHUNK), f"OPEN:{wire}", listener]
    subprocess.run(command, check=True)  # noqa: S603 - no shell
    return time.monotonic() - began


def main(name: str, address: str, what: str) -> None:
    """Be one of SENDERS, a strategy of ours, or the reader, and print what came of it.

    Args:
        name: who to be.
        address: where to listen, or to connect.
        what: the archive's path, for us a directory's too; for the reader, the bytes to expect
            after the ready byte.
    """
    if name != READER:
        print("ready", flush=True)
    if not sys.stdin.readline():
        return  # whoever started this is gone
    if name == READER:
        print(json.dumps(_read(address, int(what))))
        return
    send = SENDERS.get(name)
    memory = PeakMemory()
    before = _cpu()
    seconds = send(address, what) if send else _ours(address, what, name)
    cpu = _cpu() - before
    peak = None if send is _socat else memory.measure()["peak"]
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}))


def _cpu() -> float:
    """Return the processor seconds of this process and of those it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


SENDERS: Final[dict[str, Callable[[str, str], float]]] = {
    "socket.sendfile": lambda address, archive: _plainly(address, archive, _sendfile),
    "read+sendall": lambda address, archive: _plainly(address, archive, _sendall),
    SOCAT: _socat,
}
"""What a user would take in place of this package. socat takes the stream whole: see `wire`."""

if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
