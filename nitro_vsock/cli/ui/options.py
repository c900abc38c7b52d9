"""Owns: the options that several commands share, and the launch that they describe.

Must not know: what a command does with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from nitro_vsock.cli.ui.failures import MEANING
from nitro_vsock.cli.ui.output import Settings
from nitro_vsock.cli.ui.params import parse_peer_cid, parse_variable
from nitro_vsock.cli.ui.rootfs import choose_rootfs
from nitro_vsock.deadline import DEFAULT_TIMEOUT
from nitro_vsock.launch import DeviceProxyList, EnclaveArgsWriter
from nitro_vsock.protocol import VMADDR_CID_HOST
from nitro_vsock.rootfs import Rootfs
from nitro_vsock.wire import DEFAULT_GUEST, Guest

EPILOG: Final = "\b\nExit codes:\n" + "\n".join(
    f"  {code.value:>3}  {text}" for code, text in MEANING.items()
)

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Settings).json = True


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Settings).debug = True
        logging.getLogger("nitro_vsock").setLevel(logging.DEBUG)


def global_options(command: _Command) -> _Command:
    """Add the options that stand before or after the command's name."""
    for name, callback, text in (
        ("--json", _set_json, "Print one JSON object on stdout, also for an error."),
        ("--debug", _set_debug, "Show tracebacks and the library's log."),
    ):
        command = click.option(
            name, is_flag=True, expose_value=False, is_eager=True, callback=callback, help=text
        )(command)
    return command


exclude_option = click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Leave out of a directory, with all in it: '*.pyc' anywhere, 'usr/share/doc' from the "
    "root; repeat it.",
)

timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=DEFAULT_TIMEOUT.seconds,
    show_default=True,
    metavar="SECONDS",
    help="For all of the launch.",
)

cid_option = click.option(
    "--cid", type=int, required=True, help="Of the enclave; the port is CID + 1."
)

uds_option = click.option(
    "--uds-path",
    metavar="PATH",
    help="Use a hybrid vsock: the Unix socket PATH_<CID + 1>, as Firecracker does.",
)

host_cid_option = click.option(
    "--host-cid",
    type=int,
    default=VMADDR_CID_HOST,
    show_default=True,
    help="Where to connect: 2 from a guest, 1 over loopback.",
)

enclave_fd_option = click.option(
    "--enclave-fd",
    type=int,
    metavar="FD",
    help="An inherited descriptor of the enclave; give up when it hangs up.",
)

preflight_option = click.option(
    "--no-preflight", is_flag=True, help="Skip the quick checks of the launch."
)


def peer_options(command: _Command) -> _Command:
    """Add what says whom to admit: peer_cid, strict_peer."""
    for option in (
        click.option(
            "--peer-cid",
            type=parse_peer_cid,
            metavar="CID",
            help="Whom to admit: a CID, or 'any'; 1 over loopback.  [default: --cid]",
        ),
        click.option("--strict-peer", is_flag=True, help="Fail at the first stranger."),
    )[::-1]:
        command = option(command)
    return command


LAUNCH_SETTINGS: Final = {"allow_interspersed_args": False}
"""For a command with `launch_options`: the first word that is no option begins the guest's command
line, whose options are its own."""


def launch_options(command: _Command) -> _Command:
    """Add what says what a launch hands over: rootfs, exclude, exec_path, env, argv."""
    for option in (
        click.option(
            "--rootfs",
            required=True,
            metavar="DIR|TAR",
            help="A directory that is to be /, or a plain tar, all under rootfs/.",
        ),
        exclude_option,
        click.option(
            "--exec-path", metavar="PATH", help="The program to measure.  [default: argv[0]]"
        ),
        click.option(
            "--env",
            type=parse_variable,
            multiple=True,
            required=True,
            metavar="NAME=VALUE",
            help="A variable for the program; repeat it. The last of a name counts.",
        ),
        click.option(
            "--guest",
            type=click.Choice([guest.name for guest in Guest.published()]),
            default=DEFAULT_GUEST.name,
            show_default=True,
            help="The guest in the enclave's image.",
        ),
        click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED),
    )[::-1]:
        command = option(command)
    return command


def make_writer(
    rootfs: str,
    exclude: tuple[str, ...],
    exec_path: str | None,
    env: tuple[tuple[bytes, bytes], ...],
    argv: tuple[str, ...],
    guest: str,
    *,
    network_proxy: bool = False,
    app_output: bool = False,
    proxies: DeviceProxyList | None = None,
    choose: Callable[[str, tuple[str, ...]], Rootfs] = choose_rootfs,
) -> EnclaveArgsWriter:
    """Return the writer of the launch that `launch_options` describe.

    Args:
        rootfs: a path.
        exclude: globs.
        exec_path: None stands for argv[0].
        env: names and values.
        argv: of the program.
        guest: the name of one.
        network_proxy: a flag of the writer.
        app_output: a flag of the writer.
        proxies: of the writer.
        choose: makes a source of the path and the globs.

    Raises:
        click.UsageError, NitroVsockError: as `choose` and the writer do.
    """
    return EnclaveArgsWriter(
        choose(rootfs, exclude),
        os.fsencode(exec_path or argv[0]),
        list(map(os.fsencode, argv)),
        dict(env),
        network_proxy=network_proxy,
        app_output=app_output,
        proxies=proxies,
        guest=guest,
    )
