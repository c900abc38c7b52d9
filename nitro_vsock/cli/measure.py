"""Owns: the command `measure`. Must not know: how registers are computed."""

from __future__ import annotations

import json
from typing import Any, Final

import click

from nitro_vsock.cli.eif import DEBUG_MODE, NOT_VERIFIED, describe_registers
from nitro_vsock.cli.ui import output
from nitro_vsock.cli.ui.options import (
    EPILOG,
    LAUNCH_SETTINGS,
    global_options,
    launch_options,
    make_writer,
)
from nitro_vsock.cli.ui.output import Settings
from nitro_vsock.enclave import Eif

NOT_MEASURED: Final = (
    "names, modes, owners and times of members",
    "links, directories and empty files",
    "members whose name contains rootfs/etc/hostname or rootfs/etc/hosts",
)


@click.command(epilog=EPILOG, context_settings=LAUNCH_SETTINGS)
@launch_options
@click.option(
    "--kms-policy", is_flag=True, help="Print the condition block of a KMS key policy instead."
)
@click.option(
    "--eif", metavar="FILE", help="The enclave image: adds PCR0, 1, 2 and, where it is signed, 8."
)
@click.option("--role-arn", metavar="ARN", help="Of the parent instance's IAM role: adds PCR3.")
@click.option("--instance-id", metavar="ID", help="Of the parent instance: adds PCR4.")
@global_options
@click.pass_obj
def measure(
    settings: Settings,
    /,
    kms_policy: bool,
    eif: str | None,
    role_arn: str | None,
    instance_id: str | None,
    **launch: Any,
) -> None:
    """Predict the registers (PCRs) of an enclave that takes this launch.

    Takes the options of `send` that say what is sent. PCR16 and PCR17 are of the launch; with --eif
    you get all the registers, and the condition block of a KMS key policy for them.
    """
    if eif is None and (role_arn is not None or instance_id is not None):
        raise click.UsageError("--role-arn and --instance-id need --eif")
    writer = make_writer(**launch)
    warnings: list[str] = []
    if eif is None:
        found = writer.measure()
        condition = {"Condition": found.kms_condition()}
        data: dict[str, Any] = {**found.as_dict(), "not_measured": list(NOT_MEASURED)}
        lines = [f"PCR16        {found.pcr16.hex()}", f"PCR17        {found.pcr17.hex()}"]
        lines += [f"not measured {text}" for text in NOT_MEASURED]
    else:
        with Eif.open(eif) as image:
            # The image first: it is the quicker one to be wrong.
            registers = image.measurements(role_arn=role_arn, instance_id=instance_id)
        registers = registers.joined(writer.measure())
        condition = {"Condition": registers.kms_condition()}
        warnings = [DEBUG_MODE, *([NOT_VERIFIED] if image.signed else []), *image.warnings]
        data = {
            **registers.as_dict(),
            **condition,
            "not_measured": list(NOT_MEASURED),
            "warnings": warnings,
        }
        lines = describe_registers(registers)
        lines += [f"not measured {text}" for text in NOT_MEASURED]
        lines += [f"warning      {text}" for text in warnings]
        lines.append(json.dumps(condition, indent=2))
    if kms_policy:
        for text in warnings:
            output.print_note(f"warning: {text}")
        data, lines = condition, [json.dumps(condition, indent=2)]
    output.print_result(settings, data, lines)
