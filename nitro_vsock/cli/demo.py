"""Owns: the demonstration: a reader in a process of its own, a launch to it, what both saw.

Must not know: the options, how progress and results look.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nitro_vsock import errors
from nitro_vsock.cli import samples
from nitro_vsock.cli.doctor import loopback_problem, strategies
from nitro_vsock.cli.failures import DemoError
from nitro_vsock.cli.memory import PeakMemory
from nitro_vsock.cli.output import Settings, format_bytes, print_note, show_progress
from nitro_vsock.cli.rootfs import choose_rootfs
from nitro_vsock.protocol import VMADDR_CID_LOCAL
from nitro_vsock.sources import Rootfs
from nitro_vsock.transport import Strategy
from nitro_vsock.writer import EnclaveArgsWriter, Launch, LaunchReport

_ARGV: Final = ["/usr/bin/python3", "-c", "print('hello from the enclave')", "a name with spaces"]
_ENVP: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "GREETING": "héllo"}
_FOLDER_ON_DISK: Final = "/var/tmp"  # noqa: S108 - only a place for a TemporaryDirectory
_BLAMES_THE_READER: Final = (
    errors.PeerClosedError,
    errors.VsockWriteError,
    errors.LaunchCancelledError,
)


@dataclass(frozen=True)
class Outcome:
    """What a demonstration showed.

    Attributes:
        transport: "vsock" or "unix".
        report: the sender's.
        received: what the reader said, as `receive --json` does.
        memory: the sender's, see PeakMemory.measure.
        sha256: of the source, computed by the sender after the transfer.
    """

    transport: str
    report: LaunchReport
    received: dict[str, Any]
    memory: dict[str, int | bool]
    sha256: str


def run(settings: Settings, rootfs: Path | None, size: int | None, timeout: float) -> Outcome:
    """Send a root file system to a reader in another process.

    Args:
        settings: with debug, the reader's log is shown too.
        rootfs: a directory or an archive, or None for one that is made here.
        size: of the archive to make; None packs the standard library.
        timeout: seconds for the launch.

    Raises:
        NitroVsockError: the sender failed.
        DemoError: the reader failed, or the digests differ.
    """
    problem = loopback_problem()
    with (
        tempfile.TemporaryDirectory(prefix="nitro_vsock-", dir=_folder()) as folder,
        _archive(rootfs, size, folder, socket.AF_UNIX if problem else socket.AF_VSOCK) as archive,
    ):
        source = choose_rootfs(str(archive))
        writer = EnclaveArgsWriter(
            source, _ARGV[0], _ARGV, _ENVP, network_proxy=True, app_output=True
        )
        if problem is None:
            print_note("transport: AF_VSOCK, through loopback")
        else:
            print_note(f"transport: a Unix socket, since AF_VSOCK loopback is not here ({problem})")
        uds_path = None if problem is None else str(Path(folder, "v.sock"))
        outcome = _launch(settings, writer, uds_path, timeout)
    arrived = outcome.received["rootfs_sha256"]
    if outcome.sha256 != arrived:
        raise DemoError(f"the digests differ: {outcome.sha256} was sent, {arrived} arrived")
    return outcome


@contextmanager
def _archive(
    rootfs: Path | None, size: int | None, folder: str, family: socket.AddressFamily
) -> Iterator[Path]:
    """Give the path of what is to be sent, and say what it is."""
    if rootfs is not None:
        print_note(f"root file system: {rootfs}")
        yield rootfs
    elif size is None:
        archive = Path(folder, "rootfs.tar")
        what = samples.pack_standard_library(archive)
        print_note(f"root file system: {format_bytes(archive.stat().st_size)}, {what}")
        yield archive
    else:
        print_note(f"root file system: {format_bytes(size)} of zeros in a tar")
        mapped = strategies(family)["file"] == Strategy.MMAP
        with samples.zeros(size, folder, in_memory=not mapped) as archive:
            yield archive


def _folder() -> str | None:
    """Return where to work: TMPDIR, or else a place that is not likely to be memory.

    On some systems /tmp is a tmpfs, where reading a hole through a mapping takes real memory.
    """
    if "TMPDIR" in os.environ or not os.access(_FOLDER_ON_DISK, os.W_OK | os.X_OK):
        return None
    return _FOLDER_ON_DISK


def _launch(
    settings: Settings,
    writer: EnclaveArgsWriter,
    uds_path: str | None,
    timeout: float,
) -> Outcome:
    # Random, so that demonstrations side by side do not meet; above the privileged ports.
    cid = 5000 + 5 * secrets.randbelow(1 << 28)
    with (
        writer.listen(cid, uds_path=uds_path, peer_cid=VMADDR_CID_LOCAL) as launch,
        _reader(settings, launch, uds_path, timeout) as reader,
    ):
        try:
            with show_progress("waiting for the reader") as show:
                memory = PeakMemory()
                report = launch.send(timeout, show)
                measured = memory.measure()
        except _BLAMES_THE_READER:
            reader.result()  # says why it went away, where it knows
            raise
        received = reader.result()
    return Outcome(
        transport="vsock" if uds_path is None else "unix",
        report=report,
        received=received,
        memory=measured,
        # Not earlier: it would take processor time from the transfer.
        sha256=_digest(writer.rootfs),
    )


def _digest(rootfs: Rootfs) -> str:
    digest = hashlib.sha256()
    source = rootfs.open()
    try:
        for chunk in source.chunks():
            digest.update(chunk)
    except errors.SourceError as error:
        error.stage = None  # the launch is over
        raise
    finally:
        source.close()
    return digest.hexdigest()


class _Reader:
    """`nitro-vsock receive` in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], launch: Launch) -> None:
        self._process = process
        self._launch = launch
        self._said = b""
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self) -> None:
        """Take what it says; where it fails, do not let the launch wait for it."""
        self._said, _ = self._process.communicate()
        if self._process.returncode:
            self._launch.cancel()

    def result(self) -> dict[str, Any]:
        """Wait for its end and return what it received. Raises DemoError."""
        self._thread.join()
        code = self._process.returncode
        if code == 0:
            received: dict[str, Any] = json.loads(self._said)
            return received
        try:
            details = json.loads(self._said)["error"]
        except ValueError:
            message = f"the reader ended with exit code {code} and said nothing (try --debug)"
            raise DemoError(message) from None
        details["message"] = f"the reader: {details['message']}"
        raise DemoError(details["message"], code, details)

    def end(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._thread.join()


@contextmanager
def _reader(
    settings: Settings, launch: Launch, uds_path: str | None, timeout: float
) -> Iterator[_Reader]:
    where = ["--host-cid", str(VMADDR_CID_LOCAL)] if uds_path is None else ["--uds-path", uds_path]
    process = subprocess.Popen(  # noqa: S603 - our own program, no shell
        [
            sys.executable,
            "-m",
            "nitro_vsock",
            *(["--debug"] if settings.debug else []),
            "receive",
            f"--cid={launch.cid}",
            *where,
            f"--timeout={timeout}",
            "--strict",
            "--json",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if settings.debug else subprocess.DEVNULL,
        # A folder named nitro_vsock in the working directory must not be taken for the package.
        cwd=Path(os.sep),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
    reader = _Reader(process, launch)
    try:
        yield reader
    finally:
        reader.end()
