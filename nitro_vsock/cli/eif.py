"""Owns: the commands `eif info`, `eif verify` and `eif build`.

Knows nothing of: the format of an image.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from typing import Any, Final

import click

from nitro_vsock.cli.ui import output
from nitro_vsock.cli.ui.options import EPILOG, global_options
from nitro_vsock.cli.ui.output import Settings
from nitro_vsock.cli.ui.params import parse_size
from nitro_vsock.enclave import Eif, EnclaveMeasurement, SigningCertificate, build_eif
from nitro_vsock.enclave.build import ARCHITECTURES, read_metadata

DEBUG_MODE: Final = (
    "an enclave in debug mode attests zeros for PCR0, PCR1 and PCR2, so a policy that names them "
    "denies it"
)


NOT_VERIFIED: Final = (
    "PCR8 is of the image's certificate; `nitro-vsock eif verify` checks its signature"
)


def describe_registers(found: EnclaveMeasurement) -> list[str]:
    """Return a line for each register that is known."""
    return [f"{f'PCR{number}':<12} {value.hex()}" for number, value in found.registers.items()]


@click.group(epilog=EPILOG)
@global_options
def eif() -> None:
    """Look into enclave images, verify and build them."""


@eif.command(epilog=EPILOG)
@click.argument("file")
@global_options
@click.pass_obj
def info(settings: Settings, file: str) -> None:
    """Show what an enclave image holds, and its registers.

    The signature is not verified: see `eif verify`.
    """
    with Eif.open(file) as image:
        found = image.measurements()
        about = image.metadata()
        line = os.fsdecode(image.cmdline())
    sections = [
        {"type": str(part.type), "offset": part.offset, "size": part.size}
        for part in image.sections
    ]
    output.print_result(
        settings,
        {
            "version": image.version,
            "architecture": image.architecture,
            "default_memory": image.default_memory,
            "default_cpus": image.default_cpus,
            "bytes": image.size,
            "checksum": image.checksum,
            "sections": sections,
            "cmdline": line,
            "signed": image.signed,
            "measurements": found.as_dict(),
            "metadata": about,
            "warnings": list(image.warnings),
        },
        [
            f"version      {image.version}",
            f"architecture {image.architecture}",
            f"asks for     {output.format_bytes(image.default_memory)} of memory, "
            f"{image.default_cpus:,} CPUs",
            f"size         {image.size:,} bytes",
            f"checksum     {image.checksum:#010x}, right",
            *(
                f"section      {part['type']:<9} {part['size']:>13,} bytes at {part['offset']:,}"
                for part in sections
            ),
            f"cmdline      {line!r}",
            f"signed       {'yes, not verified' if image.signed else 'no'}",
            *describe_registers(found),
            *(f"warning      {text}" for text in image.warnings),
            *([] if about is None else [f"metadata     {json.dumps(about, indent=2)}"]),
        ],
    )


@eif.command(epilog=EPILOG)
@click.argument("file")
@global_options
@click.pass_obj
def verify(settings: Settings, file: str) -> None:
    """Check an enclave image: form, checksum and, where it is signed, the signature.

    Exits with 0 only where all of them are right. Nobody vouches for the certificate: compare PCR8
    with the one you expect.
    """
    with Eif.open(file) as image:
        certificate = image.verify()
        found = image.measurements()
    output.print_result(
        settings,
        {
            "ok": True,
            "signed": image.signed,
            "certificate": None if certificate is None else _describe(certificate),
            "measurements": found.as_dict(),
            "warnings": list(image.warnings),
        },
        [
            f"form         right, {len(image.sections)} sections",
            "checksum     right",
            *(["signed       no"] if certificate is None else _certificate_lines(certificate)),
            *describe_registers(found),
            *(f"warning      {text}" for text in image.warnings),
        ],
    )


def _describe(certificate: SigningCertificate) -> dict[str, str]:
    return {
        "subject": certificate.subject,
        "issuer": certificate.issuer,
        "not_before": _moment(certificate.not_before),
        "not_after": _moment(certificate.not_after),
    }


def _certificate_lines(certificate: SigningCertificate) -> list[str]:
    return [
        f"signed       right, by {certificate.subject!r}",
        f"issued by    {certificate.issuer!r}",
        f"valid        {_moment(certificate.not_before)} to {_moment(certificate.not_after)}",
    ]


def _moment(when: datetime) -> str:
    return when.isoformat(timespec="seconds")


@eif.command(epilog=EPILOG)
@click.option("--kernel", required=True, metavar="FILE", help="The kernel.")
@click.option("--cmdline", required=True, metavar="TEXT", help="The kernel's command line.")
@click.option(
    "--ramdisk",
    "ramdisks",
    required=True,
    multiple=True,
    metavar="FILE",
    help="A ramdisk; repeat it. The first goes into PCR1, the others into PCR2.",
)
@click.option("--metadata", metavar="FILE", help="A JSON object, which is taken as it is.")
@click.option(
    "--arch",
    type=click.Choice(list(ARCHITECTURES)),
    default="x86_64",
    show_default=True,
    help="What the kernel is for.",
)
@click.option(
    "--memory",
    type=parse_size,
    default="1GiB",
    show_default=True,
    metavar="SIZE",
    help="What the image asks for.",
)
@click.option(
    "--cpus",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="N",
    help="What the image asks for.",
)
@click.option(
    "-o", "--output", "out", required=True, metavar="FILE", help="It appears when complete."
)
@global_options
@click.pass_obj
def build(
    settings: Settings,
    kernel: str,
    cmdline: str,
    ramdisks: tuple[str, ...],
    metadata: str | None,
    arch: str,
    memory: int,
    cpus: int,
    out: str,
) -> None:
    """Build an enclave image; the same inputs give the same bytes.

    The image is not signed.
    """
    to_stdout = out == "-"
    if to_stdout:
        settings.json = False  # stdout is the image's, also where it fails
        if os.isatty(sys.stdout.fileno()):
            raise click.UsageError("an image is not for a terminal: give a file or a pipe")
    found = build_eif(
        sys.stdout.fileno() if to_stdout else out,
        kernel,
        cmdline,
        ramdisks,
        metadata=None if metadata is None else read_metadata(metadata),
        architecture=arch,
        default_memory=memory,
        default_cpus=cpus,
    )
    lines = [f"built        {'stdout' if to_stdout else out}", *describe_registers(found)]
    if to_stdout:
        for line in lines:
            output.print_note(line)
        return
    data: dict[str, Any] = {"output": out, "measurements": found.as_dict()}
    output.print_result(settings, data, lines)
