"""Owns: the command `check`. Must not know: how findings are found."""

from __future__ import annotations

from typing import Any

import click

from nitro_vsock.check import Severity
from nitro_vsock.cli.ui import output
from nitro_vsock.cli.ui.failures import ExitCode
from nitro_vsock.cli.ui.options import (
    EPILOG,
    LAUNCH_SETTINGS,
    global_options,
    launch_options,
    make_writer,
)
from nitro_vsock.cli.ui.params import parse_size
from nitro_vsock.cli.ui.rootfs import choose_rootfs_to_check


@click.command(epilog=EPILOG, context_settings=LAUNCH_SETTINGS)
@launch_options
@click.option(
    "--memory", type=parse_size, metavar="SIZE", help="Of the enclave, such as 512MiB or 4G."
)
@click.option("--strict", is_flag=True, help="Let warnings count as errors.")
@global_options
@click.pass_context
def check(context: click.Context, /, memory: int | None, strict: bool, **launch: Any) -> None:
    """Say what the guest would fail on, without an enclave.

    Takes the options of `send` that say what is sent. Exits with 10 where there is an error.
    """
    findings = make_writer(**launch, choose=choose_rootfs_to_check).preflight(memory)
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    warnings = len(findings) - errors
    failed = bool(errors or (strict and warnings))
    output.print_findings(
        context.obj,
        findings,
        {
            "findings": [finding.as_dict() for finding in findings],
            "errors": errors,
            "warnings": warnings,
            "ok": not failed,
        },
    )
    context.exit(ExitCode.PREFLIGHT if failed else ExitCode.OK)
