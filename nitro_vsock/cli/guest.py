"""Owns: the command `guest`: the guest stand-in in a terminal of its own.

Must not know: what a guest does.
"""

from __future__ import annotations

import os
from typing import Any, Final

import click

from nitro_vsock import errors
from nitro_vsock.cli.ui import output
from nitro_vsock.cli.ui.options import EPILOG, global_options, host_cid_option
from nitro_vsock.cli.ui.output import Settings
from nitro_vsock.cli.ui.waiting import retry
from nitro_vsock.testing.emulator import GuestEmulator
from nitro_vsock.testing.script import GuestReport, Isolation, Misbehaviour, Point

_TIMEOUT: Final = 3600.0

_STDERR: Final = 2


def _choice(kind: type[Point | Misbehaviour | Isolation]) -> click.Choice[str]:
    return click.Choice([item.value for item in kind])


@click.command(epilog=EPILOG)
@click.option("--cid", type=int, required=True, help="Of the enclave; the ports are CID + 1 to 5.")
@click.option(
    "--uds-path",
    metavar="PATH",
    help="Use a hybrid vsock: the Unix sockets PATH_<port>, as Firecracker does.",
)
@host_cid_option
@click.option(
    "--isolation",
    type=_choice(Isolation),
    default=Isolation.AUTO.value,
    show_default=True,
    help="What surrounds the program: namespaces and chroot, or nothing.",
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False),
    metavar="DIR",
    help="Unpack to DIR/rootfs and leave it there.  [default: a temporary folder]",
)
@click.option("--mtu", type=int, default=1500, show_default=True, help="Of the network device.")
@click.option("--lenient", is_flag=True, help="Take what the real guest would stop at.")
@click.option("--die-at", type=_choice(Point), help="Vanish there.")
@click.option("--stall-at", type=_choice(Point), help="Stay there, everything open.")
@click.option("--misbehave", type=_choice(Misbehaviour), help="Do what no guest does.")
@click.option("--wait", is_flag=True, help="Wait for the host's listener to appear.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=_TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="From boot to the end, the program's time too.",
)
@global_options
@click.pass_obj
def guest(settings: Settings, /, wait: bool, timeout: float, lenient: bool, **options: Any) -> None:
    """Be the guest: take a launch, run its program, report how it ended.

    The program's output goes to the host where the launch asks for that, else to this command's
    stderr, as to the console. The isolation is against accidents: run programs you trust.
    """

    def attempt(seconds: float) -> GuestReport | errors.NitroVsockError:
        with GuestEmulator(
            **options, strict=not lenient, timeout=seconds, console=_STDERR, on_point=_tell
        ) as emulator:
            try:
                return emulator.run()
            except errors.NitroVsockError as error:
                if Point.HANDSHAKE not in emulator.points:
                    raise  # nobody was there
                return error

    outcome = retry(attempt, timeout) if wait else attempt(timeout)
    if isinstance(outcome, errors.NitroVsockError):
        raise outcome
    output.print_result(settings, outcome.as_dict(), _describe(outcome))


def _tell(point: Point) -> None:
    if point is not Point.CONNECT:
        output.print_note(f"guest: {point}")


def _describe(report: GuestReport) -> list[str]:
    lines = [] if report.args is None else output.describe_args(report.args)
    if report.isolation is not None:
        lines.append(f"isolation    {report.isolation}, root {report.root}")
    lines += [f"note         {note}" for note in report.notes]
    if report.signals:
        lost = f", {report.signals_lost} before the program ran" if report.signals_lost else ""
        lines.append(f"signals      {' '.join(map(str, report.signals))}{lost}")
    if report.died_at is not None:
        lines.append(f"died         at {report.died_at}, as told")
    if report.stalled_at is not None:
        lines.append(f"stalled      at {report.stalled_at}, as told")
    if report.program_status is not None:
        lines.append(f"program      {_end(report.program_status)}")
    if report.status is not None:
        answer = "answered" if report.answered else "not answered"
        lines.append(f"reported     {report.status}, {answer} by the host")
    return lines


def _end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
