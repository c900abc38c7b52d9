"""Owns: the command `measure`. Must not know: how registers are computed."""

from __future__ import annotations

import json
from typing import Any, Final

import click

from nitro_vsock.cli.ui import output
from nitro_vsock.cli.ui.options import (
    EPILOG,
    LAUNCH_SETTINGS,
    global_options,
    launch_options,
    make_writer,
)
from nitro_vsock.cli.ui.output import Settings

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
@global_options
@click.pass_obj
def measure(settings: Settings, /, kms_policy: bool, **launch: Any) -> None:
    """Predict the registers PCR16 and PCR17 of an enclave that takes this launch.

    Takes the options of `send` that say what is sent.
    """
    found = make_writer(**launch).measure()
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
