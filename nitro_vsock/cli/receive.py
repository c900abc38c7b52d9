"""Owns: the command `receive`. Must not know: how a launch is read."""

from __future__ import annotations

import dataclasses

import click

from nitro_vsock.cli.ui import output
from nitro_vsock.cli.ui.options import (
    EPILOG,
    cid_option,
    global_options,
    host_cid_option,
    timeout_option,
    uds_option,
)
from nitro_vsock.cli.ui.output import Settings
from nitro_vsock.cli.ui.waiting import retry
from nitro_vsock.launch import EnclaveArgs, EnclaveArgsReader


@click.command(epilog=EPILOG)
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
