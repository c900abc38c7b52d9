"""Owns: the command `host`: an enclave's whole life from the command line.

Must not know: how a session works, how an enclave is started.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeVar

import click

from nitro_vsock import errors
from nitro_vsock.cli.ui import output
from nitro_vsock.cli.ui.failures import ExitCode
from nitro_vsock.cli.ui.options import (
    EPILOG,
    LAUNCH_SETTINGS,
    cid_option,
    enclave_fd_option,
    global_options,
    launch_options,
    make_writer,
    peer_options,
    preflight_option,
    timeout_option,
    uds_option,
)
from nitro_vsock.cli.ui.output import Settings
from nitro_vsock.cli.ui.passt import passt
from nitro_vsock.launch import DeviceProxyList
from nitro_vsock.session import (
    Console,
    EnclaveSession,
    ExitStatus,
    NetProxy,
    OutputProxy,
    SessionTimeouts,
    SignalHandler,
)

_Command = TypeVar("_Command", bound=Callable[..., Any])

_STDOUT: Final = 1

_STDERR: Final = 2

_ENDING: Final = b"nitro-vsock: ending the program; Ctrl-C once more ends this command\n"

_BY_SIGNAL: Final = 128
"""A shell's exit code for a program that a signal ended is this much above the signal's number."""


def _seconds(name: str, default: float | None, text: str) -> Callable[[_Command], _Command]:
    return click.option(
        name,
        type=click.FloatRange(min=0),
        default=default,
        show_default=default is not None,
        metavar="SECONDS",
        help=text,
    )


@click.command(epilog=EPILOG, context_settings=LAUNCH_SETTINGS)
@cid_option
@launch_options
@uds_option
@timeout_option
@_seconds("--run-timeout", None, "How long the program may run.  [default: no limit]")
@_seconds("--stop-timeout", 30.0, "How long it may take to end after SIGTERM or Ctrl-C.")
@peer_options
@enclave_fd_option
@preflight_option
@click.option(
    "-o",
    "--output",
    "out",
    default="-",
    metavar="FILE",
    help="Where the program's output goes; '-' is stdout.",
)
@click.option(
    "--console", is_flag=True, help="Show the console on stderr; the enclave is in debug mode."
)
@click.option(
    "--net-fd", type=int, metavar="FD", help="An inherited socket of passt, gvproxy or their like."
)
@click.option("--net-socket", metavar="PATH", help="The path of such a socket, to connect to.")
@click.option("--passt", "run_passt", is_flag=True, help="Start passt for the network.")
@click.option(
    "--passt-arg", multiple=True, metavar="ARG", help="For passt, such as --passt-arg=-t8080."
)
@global_options
@click.pass_context
def host(
    context: click.Context,
    /,
    cid: int,
    uds_path: str | None,
    timeout: float,
    run_timeout: float | None,
    stop_timeout: float,
    peer_cid: int | None,
    strict_peer: bool,
    enclave_fd: int | None,
    no_preflight: bool,
    out: str,
    console: bool,
    net_fd: int | None,
    net_socket: str | None,
    run_passt: bool,
    passt_arg: tuple[str, ...],
    **launch_arguments: Any,
) -> None:
    """Be the host of an enclave that is about to boot, until its program has ended.

    Launches, shows the program's output on stdout, runs its network, passes SIGTERM and Ctrl-C on
    as SIGTERM (a second Ctrl-C ends this command), and exits with the program's exit code, or 128
    and the number of the signal that ended it. 125: the host's side failed; end the enclave.

    ARGV is the program and its arguments, as the guest is to run it. Put it after `--`.
    """
    settings: Settings = context.obj
    if out == "-":
        settings.json = False  # stdout is the program's
    backends = [net_fd is not None, net_socket is not None, run_passt]
    if sum(backends) > 1:
        raise click.UsageError("--net-fd, --net-socket and --passt exclude each other")
    if passt_arg and not run_passt:
        raise click.UsageError("--passt-arg needs --passt")
    proxies: list[Any] = [OutputProxy(_STDOUT if out == "-" else out), SignalHandler(())]
    if console:
        proxies.append(Console(_STDERR))
    arrived: list[int] = []
    with ExitStack() as stack:
        try:
            if run_passt:
                proxies.append(NetProxy(stack.enter_context(passt(passt_arg))))
            elif net_fd is not None:
                proxies.append(NetProxy(net_fd))
            elif net_socket is not None:
                proxies.append(NetProxy(net_socket))
            writer = make_writer(**launch_arguments, proxies=DeviceProxyList(proxies))
            session = stack.enter_context(
                EnclaveSession(
                    writer,
                    cid,
                    uds_path=uds_path,
                    peer_cid=peer_cid,
                    strict_peer=strict_peer,
                    preflight=not no_preflight,
                    timeouts=SessionTimeouts(launch=timeout, run=run_timeout, stop=stop_timeout),
                )
            )
            with _signals(session, arrived):
                output.print_note(f"listening for CID {cid}")
                status = session.run_sync(enclave_fd=enclave_fd)
        except errors.LaunchCancelledError as error:
            output.print_failure(settings, error)
            context.exit(_BY_SIGNAL + arrived[0] if arrived else ExitCode.HOST)
        except errors.NitroVsockError as error:
            output.print_failure(settings, error)
            context.exit(ExitCode.HOST)
    _report(settings, status, out)
    code = status.returncode
    context.exit(code if code >= 0 else _BY_SIGNAL - code)


@contextmanager
def _signals(session: EnclaveSession, arrived: list[int]) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the program; a second SIGINT is a KeyboardInterrupt."""

    def handle(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in arrived:
            raise KeyboardInterrupt
        arrived.append(number)
        session.terminate()
        # Not print_note: this may have interrupted it.
        os.write(_STDERR, _ENDING)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(settings: Settings, status: ExitStatus, out: str) -> None:
    if not status.output_complete:
        output.print_note("the output may lack its end: something in the guest still held it open")
    if status.terminated:
        output.print_note("SIGTERM was passed on; the guest reports 0 then, whatever happened")
    if out == "-":
        output.print_note(f"the program: {status}")
        return
    assert status.launch is not None  # noqa: S101 - a session that ended has launched
    output.print_result(
        settings,
        {
            "exit_code": status.exit_code,
            "signal": status.signal,
            "core_dumped": status.core_dumped,
            "terminated": status.terminated,
            "output_complete": status.output_complete,
            "launch": status.launch.as_dict(),
        },
        [f"program      {status}", f"rootfs       {status.launch.rootfs_bytes:,} bytes"],
    )
