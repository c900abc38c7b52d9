"""Owns: the command `send`. Must not know: how a launch is sent."""

from __future__ import annotations

from typing import Any, Final

import click

from nitro_vsock.cli.ui import output
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
from nitro_vsock.transport import Strategy

_FILE_STRATEGIES: Final = [Strategy.AUTO, Strategy.SENDFILE, Strategy.MMAP, Strategy.READ]


@click.command(epilog=EPILOG, context_settings=LAUNCH_SETTINGS)
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
