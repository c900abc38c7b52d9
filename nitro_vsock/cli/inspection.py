"""Owns: the commands that look at a launch and send nothing: check, measure.

Must not know: how findings and registers are found.
"""

from __future__ import annotations

import json
from typing import Any, Final

import click

from nitro_vsock.cli import output
from nitro_vsock.cli.failures import ExitCode
from nitro_vsock.cli.options import (
    EPILOG,
    LAUNCH_SETTINGS,
    global_options,
    launch_options,
    make_writer,
)
from nitro_vsock.cli.output import Settings
from nitro_vsock.cli.params import parse_size
from nitro_vsock.cli.rootfs import choose_rootfs_to_check
from nitro_vsock.measurement import measure as measure_launch
from nitro_vsock.preflight import Severity

NOT_MEASURED: Final = (
    "names, modes, owners and times of members",
    "links, directories and empty files",
    "members whose name contains rootfs/etc/hostname or rootfs/etc/hosts",
)


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


@click.command(epilog=EPILOG, context_settings=LAUNCH_SETTINGS)
@launch_options
@click.option(
    "--kms-policy", is_flag=True, help="Print the condition block of a KMS key policy instead."
)
@global_options
@click.pass_obj
def measure(settings: Settings, /, kms_policy: bool, **launch: Any) -> None:
    """Predict the registers PCR16 and PCR17 of an enclave that takes this launch.

    Takes the options of `send` that say what is sent.
    """
    found = measure_launch(make_writer(**launch))
    condition = {"Condition": found.kms_condition()}
    if kms_policy:
        output.print_result(settings, condition, [json.dumps(condition, indent=2)])
        return
    output.print_result(
        settings,
        {**found.as_dict(), "not_measured": list(NOT_MEASURED)},
        [
            f"PCR16        {found.pcr16.hex()}",
            f"PCR17        {found.pcr17.hex()}",
            *(f"not measured {text}" for text in NOT_MEASURED),
        ],
    )
