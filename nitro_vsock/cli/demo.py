"""Owns: the demonstration: a guest in a process of its own, a launch to it, what both saw.

Must not know: the options, how progress and results look.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from nitro_vsock import errors
from nitro_vsock.cli.compare import samples
from nitro_vsock.cli.compare.memory import PeakMemory
from nitro_vsock.cli.doctor import strategies
from nitro_vsock.cli.ui import output
from nitro_vsock.cli.ui.failures import DemoError
from nitro_vsock.cli.ui.options import EPILOG, LAUNCH_SETTINGS, global_options, timeout_option
from nitro_vsock.cli.ui.output import Settings, format_bytes, print_note, show_progress
from nitro_vsock.cli.ui.params import parse_size
from nitro_vsock.cli.ui.rootfs import choose_rootfs
from nitro_vsock.launch import DeviceProxyList, EnclaveArgs, EnclaveArgsWriter, Launch, LaunchReport
from nitro_vsock.protocol import VMADDR_CID_LOCAL
from nitro_vsock.rootfs import Rootfs
from nitro_vsock.session import (
    EnclaveSession,
    ExitStatus,
    OutputProxy,
    SessionTimeouts,
    SignalHandler,
)
from nitro_vsock.testing import child
from nitro_vsock.testing.loopback import loopback_problem
from nitro_vsock.transport import Strategy


@click.command(epilog=EPILOG, context_settings=LAUNCH_SETTINGS)
@click.option(
    "--rootfs",
    type=click.Path(path_type=Path),
    metavar="DIR|TAR",
    help="A directory that is to be /, or a plain tar.  [default: made of Python's standard "
    "library, and a program]",
)
@click.option(
    "--size",
    type=parse_size,
    metavar="SIZE",
    help="Send an archive of zeros of about this size, such as 64MiB or 4GiB; it takes no space.",
)
@timeout_option
@global_options
@click.argument("argv", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def demo(
    settings: Settings,
    rootfs: Path | None,
    size: int | None,
    timeout: float,
    argv: tuple[str, ...],
) -> None:
    """Do a whole launch on this machine, without an enclave.

    A second process is the guest: it unpacks the root file system and runs a program in it, ARGV
    with --rootfs. Without ARGV a --rootfs or --size is only sent, to a reader that computes its
    digest. The guest is reached over AF_VSOCK where loopback answers (module vsock_loopback), else
    over a Unix socket.
    """
    if rootfs is not None and size is not None:
        raise click.UsageError("--rootfs and --size exclude each other")
    if argv and rootfs is None:
        raise click.UsageError("a program needs --rootfs, where it is")
    outcome = run(settings, rootfs, size, argv, timeout)
    report, memory, received = outcome.report, outcome.memory, outcome.received
    grown = f"{output.format_bytes(memory['grown'])} of it during the transfer"
    if not memory["reset"]:
        grown += " (more than the peak before it)"
    output.print_result(
        settings,
        {
            "transport": outcome.transport,
            "sent": report.as_dict(),
            "received": received,
            "sha256": outcome.sha256,
            "digests_agree": True,
            "sender_memory": memory,
            **describe_program(outcome),
        },
        [
            *show_program(outcome),
            "The guest got",
            *(f"  {line}" for line in output.describe_args(EnclaveArgs(**received))),
            "The sender",
            f"  strategy     {report.strategy}, {report.system_calls:,} system calls",
            f"  throughput   {output.format_bytes(report.throughput)}/s, to a reader that computes "
            "SHA-256 of every byte",
            f"  peak memory  {output.format_bytes(memory['peak'])}, {grown}",
            f"  sha256       {outcome.sha256}",
            "The digests agree.",
        ],
    )


_ARGV: Final = ("/usr/bin/python3", "-c", "print('hello from the enclave')", "a name with spaces")
"""What a launch hands over whose guest runs no program."""

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
        program: what became of the program; None where none was run.
        output: the lines it wrote.
        isolation: what surrounded it, see GuestReport.
    """

    transport: str
    report: LaunchReport
    received: dict[str, Any]
    memory: dict[str, int | bool]
    sha256: str
    program: ExitStatus | None = None
    output: tuple[str, ...] = ()
    isolation: str | None = None


@dataclass(frozen=True)
class _Plan:
    """What to launch: an archive or directory, and a program to run in it, if any."""

    rootfs: Path
    argv: tuple[str, ...] = ()
    status: int | None = None


def run(
    settings: Settings,
    rootfs: Path | None,
    size: int | None,
    argv: tuple[str, ...],
    timeout: float,
) -> Outcome:
    """Launch a root file system in another process, which runs a program in it.

    Args:
        settings: with debug, the guest's log is shown too.
        rootfs: a directory or an archive, or None for one that is made here.
        size: of the archive to make, without a program; None packs the standard library.
        argv: a program in `rootfs`; empty: it is only sent.
        timeout: seconds for the launch.

    Raises:
        NitroVsockError: the sender failed.
        DemoError: the guest failed, the digests differ, or the program ended otherwise than told.
    """
    problem = loopback_problem()
    with (
        tempfile.TemporaryDirectory(prefix="nitro_vsock-", dir=_folder()) as folder,
        _plan(rootfs, size, argv, folder, socket.AF_UNIX if problem else socket.AF_VSOCK) as plan,
    ):
        source = choose_rootfs(str(plan.rootfs))
        if problem is None:
            print_note("transport: AF_VSOCK, through loopback")
        else:
            print_note(f"transport: a Unix socket, since AF_VSOCK loopback is not here ({problem})")
        uds_path = None if problem is None else str(Path(folder, "v.sock"))
        launch = _run_program if plan.argv else _send
        outcome = launch(settings, source, plan, uds_path, timeout)
    arrived = outcome.received["rootfs_sha256"]
    if outcome.sha256 != arrived:
        raise DemoError(f"the digests differ: {outcome.sha256} was sent, {arrived} arrived")
    ended = outcome.program
    if ended is not None and plan.status not in (None, ended.exit_code):
        raise DemoError(f"the program was told to exit with {plan.status}; it is said: {ended}")
    return outcome


@contextmanager
def _plan(
    rootfs: Path | None,
    size: int | None,
    argv: tuple[str, ...],
    folder: str,
    family: socket.AddressFamily,
) -> Iterator[_Plan]:
    """Give what is to be launched, and say what it is."""
    if rootfs is not None:
        print_note(f"root file system: {rootfs}")
        yield _Plan(rootfs, argv)
    elif size is None:
        archive = Path(folder, "rootfs.tar")
        sample = samples.pack_sample(archive)
        print_note(f"root file system: {format_bytes(archive.stat().st_size)}, {sample.what}")
        if sample.problem:
            print_note(f"no program is run, only sent: {sample.problem}")
        yield _Plan(archive, sample.argv, sample.status if sample.argv else None)
    else:
        print_note(f"root file system: {format_bytes(size)} of zeros in a tar")
        mapped = strategies(family)["file"] == Strategy.MMAP
        with samples.zeros(size, folder, in_memory=not mapped) as archive:
            yield _Plan(archive)


def _folder() -> str | None:
    """Return where to work: TMPDIR, or else a place that is not likely to be memory.

    On some systems /tmp is a tmpfs, where reading a hole through a mapping takes real memory.
    """
    if "TMPDIR" in os.environ or not os.access(_FOLDER_ON_DISK, os.W_OK | os.X_OK):
        return None
    return _FOLDER_ON_DISK


def _cid() -> int:
    """Return a random CID, so that demonstrations side by side do not meet."""
    return 5000 + 5 * secrets.randbelow(1 << 28)  # above the privileged ports


def _send(
    settings: Settings, source: Rootfs, _plan: _Plan, uds_path: str | None, timeout: float
) -> Outcome:
    """Launch to a reader that runs nothing."""
    writer = EnclaveArgsWriter(source, _ARGV[0], _ARGV, _ENVP, network_proxy=True, app_output=True)
    options = [f"--timeout={timeout}", "--strict"]
    with (
        writer.listen(_cid(), uds_path=uds_path, peer_cid=VMADDR_CID_LOCAL) as launch,
        _other_side(settings, "receive", launch, uds_path, options) as reader,
    ):
        with reader.to_blame(), show_progress("waiting for the reader") as show:
            memory = PeakMemory()
            report = launch.send(timeout, show)
            measured = memory.measure()
        received = reader.result()
    return Outcome(
        transport="vsock" if uds_path is None else "unix",
        report=report,
        received=received,
        memory=measured,
        # Not earlier: it would take processor time from the transfer.
        sha256=_digest(source),
    )


def _run_program(
    settings: Settings, source: Rootfs, plan: _Plan, uds_path: str | None, timeout: float
) -> Outcome:
    """Be the host of a guest that runs the program, until it has ended."""
    lines: list[str] = []
    writer = EnclaveArgsWriter(
        *(source, plan.argv[0], plan.argv, _ENVP),
        proxies=DeviceProxyList([OutputProxy(lines.append), SignalHandler(())]),
    )
    timeouts = SessionTimeouts(launch=timeout, services=timeout)
    with (
        EnclaveSession(
            writer, _cid(), uds_path=uds_path, peer_cid=VMADDR_CID_LOCAL, timeouts=timeouts
        ) as session,
        _other_side(settings, "guest", session, uds_path, []) as guest,
    ):
        with guest.to_blame(), show_progress("waiting for the guest") as show:
            memory = PeakMemory()
            status = session.run_sync(progress=show)
            measured = memory.measure()
        found = guest.result()
    assert status.launch is not None  # noqa: S101 - a session that ended has launched
    return Outcome(
        transport="vsock" if uds_path is None else "unix",
        report=status.launch,
        received=found["args"],
        memory=measured,
        sha256=_digest(source),
        program=status,
        output=tuple(lines),
        isolation=found["isolation"],
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


class _OtherSide:
    """`nitro-vsock receive` or `guest` in a process of its own."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], launch: Launch | EnclaveSession
    ) -> None:
        self._name = name
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
            message = f"the {self._name} ended with exit code {code} and said nothing (try --debug)"
            raise DemoError(message) from None
        details["message"] = f"the {self._name}: {details['message']}"
        raise DemoError(details["message"], code, details)

    @contextmanager
    def to_blame(self) -> Iterator[None]:
        """Where it made the launch fail, let it say why."""
        try:
            yield
        except _BLAMES_THE_READER:
            self.result()
            raise

    def end(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._thread.join()


@contextmanager
def _other_side(
    settings: Settings,
    command: str,
    launch: Launch | EnclaveSession,
    uds_path: str | None,
    options: list[str],
) -> Iterator[_OtherSide]:
    where = ["--host-cid", str(VMADDR_CID_LOCAL)] if uds_path is None else ["--uds-path", uds_path]
    debug = ["--debug"] if settings.debug else []
    process = child.start(
        child.python_command(
            *("nitro_vsock", *debug, command, f"--cid={launch.cid}", *where, *options, "--json")
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if settings.debug else subprocess.DEVNULL,
    )
    other = _OtherSide("reader" if command == "receive" else command, process, launch)
    try:
        yield other
    finally:
        other.end()


def describe_program(outcome: Outcome) -> dict[str, Any]:
    """Return what became of the program, for machines; nothing where none was run."""
    if outcome.program is None:
        return {}
    return {
        "program": {
            "exit_code": outcome.program.exit_code,
            "signal": outcome.program.signal,
            "output": list(outcome.output),
            "isolation": outcome.isolation,
        }
    }


def show_program(outcome: Outcome) -> list[str]:
    """Return the same for people."""
    if outcome.program is None:
        return []
    return [
        f"The program ran ({outcome.isolation}) and wrote",
        *(f"  {line}" for line in outcome.output),
        f"  {outcome.program}",
    ]
