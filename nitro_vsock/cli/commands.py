"""Owns: the commands and their options, and the one place where a failure ends the process.

Must not know: how anything is done or shown.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from nitro_vsock import errors
from nitro_vsock.cli import bench as comparison
from nitro_vsock.cli import demo as demonstration
from nitro_vsock.cli import doctor as examination
from nitro_vsock.cli import failures, inspection, output
from nitro_vsock.cli.guest import guest
from nitro_vsock.cli.host import host
from nitro_vsock.cli.options import (
    EPILOG,
    LAUNCH_SETTINGS,
    cid_option,
    enclave_fd_option,
    exclude_option,
    global_options,
    host_cid_option,
    launch_options,
    make_writer,
    peer_options,
    preflight_option,
    timeout_option,
    uds_option,
)
from nitro_vsock.cli.output import Settings
from nitro_vsock.cli.params import parse_size
from nitro_vsock.cli.rootfs import choose_rootfs
from nitro_vsock.cli.waiting import retry
from nitro_vsock.progress import Meter
from nitro_vsock.reader import EnclaveArgs, EnclaveArgsReader
from nitro_vsock.sinks import open_sink
from nitro_vsock.transport import Strategy

PROGRAM: Final = "nitro-vsock"

_FILE_STRATEGIES: Final = [Strategy.AUTO, Strategy.SENDFILE, Strategy.MMAP, Strategy.READ]


@click.group(
    epilog=EPILOG,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="nitro_vsock", prog_name=PROGRAM)
@global_options
def cli() -> None:
    """Hand a booting Nitro enclave its root file system, program and environment over vsock."""


@cli.command(epilog=EPILOG, context_settings=LAUNCH_SETTINGS)
@cid_option
@launch_options
@uds_option
@timeout_option
@click.option(
    "--strategy",
    type=click.Choice([strategy.value for strategy in _FILE_STRATEGIES]),
    default=Strategy.AUTO.value,
    show_default=True,
    help="How to send the archive.",
)
@click.option("--network-proxy", is_flag=True, help="The guest is to connect to the network.")
@click.option("--app-output", is_flag=True, help="The guest is to send the program's output.")
@peer_options
@enclave_fd_option
@preflight_option
@global_options
@click.pass_obj
def send(
    settings: Settings,
    /,
    cid: int,
    uds_path: str | None,
    timeout: float,
    strategy: str,
    network_proxy: bool,
    app_output: bool,
    peer_cid: int | None,
    strict_peer: bool,
    enclave_fd: int | None,
    no_preflight: bool,
    **launch_arguments: Any,
) -> None:
    """Send a launch to the enclave that is about to boot.

    ARGV is the program and its arguments, as the guest is to run it. Put it after `--`.
    """
    writer = make_writer(**launch_arguments, network_proxy=network_proxy, app_output=app_output)
    with writer.listen(
        cid,
        uds_path=uds_path,
        peer_cid=peer_cid,
        strict_peer=strict_peer,
        strategy=strategy,
        preflight=not no_preflight,
    ) as launch:
        output.print_note(f"listening at {launch.address} for CID {cid}")
        with output.show_progress("waiting for the guest") as show:
            report = launch.send(timeout, show, enclave_fd=enclave_fd)
    seconds = report.seconds["rootfs"] + report.seconds["finish"]
    output.print_result(
        settings,
        report.as_dict(),
        [
            f"sent         {report.bytes_sent:,} bytes to {report.peer}",
            f"rootfs       {report.rootfs_bytes:,} bytes in {seconds:.2f} s by {report.strategy}, "
            f"{output.format_bytes(report.throughput)}/s",
            f"strangers    {report.strangers_refused} refused",
        ],
    )


@cli.command(epilog=EPILOG)
@cid_option
@uds_option
@host_cid_option
@click.option("--rootfs-out", metavar="FILE", help="Store the archive; it appears when complete.")
@click.option("--strict", is_flag=True, help="Also enforce what the real guest needs.")
@click.option("--wait", is_flag=True, help="Wait for the host's listener to appear.")
@timeout_option
@global_options
@click.pass_obj
def receive(
    settings: Settings,
    cid: int,
    uds_path: str | None,
    host_cid: int,
    rootfs_out: str | None,
    strict: bool,
    wait: bool,
    timeout: float,
) -> None:
    """Take a launch as the guest does.

    The host's listener must be there already, or see --wait.
    """

    def attempt(seconds: float) -> EnclaveArgs:
        with EnclaveArgsReader(cid, uds_path=uds_path, host_cid=host_cid, strict=strict) as reader:
            return reader.read_args(rootfs_out, seconds, show)

    with output.show_progress("waiting for the host") as show:
        args = retry(attempt, timeout) if wait else attempt(timeout)
    output.print_result(settings, dataclasses.asdict(args), output.describe_args(args))


@cli.command(epilog=EPILOG)
@click.argument("rootfs")
@click.option(
    "-o",
    "--output",
    "out",
    required=True,
    metavar="FILE",
    help="Where to; it appears when complete. '-' is stdout.",
)
@exclude_option
@global_options
@click.pass_obj
def pack(settings: Settings, rootfs: str, out: str, exclude: tuple[str, ...]) -> None:
    """Write the archive that `send` would send, byte for byte.

    ROOTFS is a directory that is to be /, or an archive.
    """
    to_stdout = out == "-"
    if to_stdout:
        settings.json = False  # stdout is the archive's, also where it fails
        if os.isatty(sys.stdout.fileno()):
            raise click.UsageError("an archive is not for a terminal: give a file or a pipe")
    source = choose_rootfs(rootfs, exclude).open()
    try:
        with (
            open_sink(sys.stdout.fileno() if to_stdout else out) as store,
            output.show_progress("packing") as show,
        ):
            meter = Meter(show)
            meter.total = source.length
            meter.begin(errors.Stage.ROOTFS)
            for chunk in source.chunks():
                store(chunk)
                meter.done += len(chunk)
                meter.tick()
            source.verify()
            meter.tick(last=True)
    except errors.SourceError as error:
        error.stage = None  # of a launch, and there is none
        raise
    finally:
        source.close()
    lines = [f"packed {source.length:,} bytes into {'stdout' if to_stdout else out}"]
    if to_stdout:
        output.print_note(lines[0])
    else:
        output.print_result(settings, {"output": out, "bytes": source.length}, lines)


@cli.command(epilog=EPILOG, context_settings=LAUNCH_SETTINGS)
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
    outcome = demonstration.run(settings, rootfs, size, argv, timeout)
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
            **demonstration.describe_program(outcome),
        },
        [
            *demonstration.show_program(outcome),
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


@cli.command(epilog=EPILOG)
@click.option(
    "--rootfs",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="What to send.  [default: random bytes]",
)
@click.option(
    "--size",
    type=parse_size,
    default="256MiB",
    show_default=True,
    metavar="SIZE",
    help="How much to send, without --rootfs; it takes this much disk, twice with socat.",
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Launches of each."
)
@click.option(
    "--cid",
    type=int,
    metavar="CID",
    help="A real reader's, which connects once for every launch.  [default: a reader of ours]",
)
@uds_option
@global_options
@click.pass_obj
def bench(
    settings: Settings,
    rootfs: Path | None,
    size: int,
    rounds: int,
    cid: int | None,
    uds_path: str | None,
) -> None:
    """Compare senders on this machine, by turns in one run.

    They are this package with each strategy, socket.sendfile, a loop of read and sendall, and socat
    where it is installed. Each runs in a process of its own and sends the same bytes, over AF_VSOCK
    where loopback answers, else over a Unix socket; with --cid, to a reader of yours.
    """
    if uds_path is not None and cid is None:
        raise click.UsageError("--uds-path needs --cid")
    with comparison.arena(size, rootfs, cid, uds_path) as (place, archive, wire):
        output.print_note(f"transport: {place.transport}")
        length = archive.stat().st_size
        rows = comparison.run(
            place,
            comparison.entrants(place, archive, wire),
            length,
            rounds,
            lambda done, total: output.print_note(f"round {done} of {total}"),
        )
    output.print_result(
        settings,
        {
            "transport": place.transport,
            "kernel": os.uname().release,
            "rootfs_bytes": length,
            "rounds": rounds,
            "senders": comparison.as_objects(rows),
        },
        output.describe_rows(rows),
    )


@cli.command(epilog=EPILOG)
@global_options
@click.pass_context
def doctor(context: click.Context) -> None:
    """Say what launches can do on this machine.

    Exits with 9 where the kernel has no AF_VSOCK, with 0 elsewhere.
    """
    found, lines = examination.examine()
    output.print_result(context.obj, found, lines)
    context.exit(failures.ExitCode.OK if found["af_vsock"] else failures.ExitCode.UNSUPPORTED)


cli.add_command(inspection.check)
cli.add_command(inspection.measure)
cli.add_command(host)
cli.add_command(guest)


def run(args: list[str]) -> int:
    """Run the command line with these arguments; return the exit code."""
    settings = Settings()
    signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(format=f"{PROGRAM}: %(levelname)s: %(message)s")
    output.allow_any_text()
    try:
        # Not cli.main(): that takes every OSError with EPIPE, a PeerClosedError too, for a closed
        # stdout and exits with 1 at once.
        with cli.make_context(PROGRAM, args, obj=settings) as context:
            cli.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        # The mistake may stand before --json, so that click never came to it.
        settings.json = settings.json or "--json" in takewhile(lambda arg: arg != "--", args)
        return _fail(settings, error)
    except BaseException as error:
        return _fail(settings, error)
    else:
        return failures.ExitCode.OK


def _fail(settings: Settings, error: BaseException) -> int:
    output.print_failure(settings, error)
    return failures.exit_code(error)


def _terminate(*_: object) -> NoReturn:
    raise failures.TerminatedError
