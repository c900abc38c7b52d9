"""Owns: the command `pack`. Must not know: how an archive is made."""

from __future__ import annotations

import os
import sys

import click

from nitro_vsock import errors
from nitro_vsock.cli.ui import output, streams
from nitro_vsock.cli.ui.options import EPILOG, exclude_option, global_options
from nitro_vsock.cli.ui.output import Settings
from nitro_vsock.cli.ui.rootfs import choose_rootfs
from nitro_vsock.progress import Meter
from nitro_vsock.rootfs import open_sink


@click.command(epilog=EPILOG)
@click.argument("rootfs")
@click.option(
    "-o",
    "--output",
    "out",
    required=True,
    metavar="FILE",
    help="Where to; it appears when complete. '-' is stdout.",
)
@exclude_option
@global_options
@click.pass_obj
def pack(settings: Settings, rootfs: str, out: str, exclude: tuple[str, ...]) -> None:
    """Write the archive that `send` would send, byte for byte.

    ROOTFS is a directory that is to be /, or an archive.
    """
    to_stdout = out == "-"
    if to_stdout:
        settings.json = False  # stdout is the archive's, also where it fails
        if sys.stdout.fileno() in streams.closed_at_start:
            raise click.UsageError("stdout is closed: give a file or a pipe")
        if os.isatty(sys.stdout.fileno()):
            raise click.UsageError("an archive is not for a terminal: give a file or a pipe")
    source = choose_rootfs(rootfs, exclude).open()
    try:
        with (
            open_sink(sys.stdout.fileno() if to_stdout else out) as store,
            output.show_progress("packing") as show,
        ):
            meter = Meter(show)
            meter.total = source.length
            meter.begin(errors.Stage.ROOTFS)
            for chunk in source.chunks():
                store(chunk)
                meter.done += len(chunk)
                meter.tick()
            source.verify()
            meter.tick(last=True)
    except errors.SourceError as error:
        error.stage = None  # of a launch, and there is none
        raise
    finally:
        source.close()
    lines = [f"packed {source.length:,} bytes into {'stdout' if to_stdout else out}"]
    if to_stdout:
        output.print_note(lines[0])
    else:
        output.print_result(settings, {"output": out, "bytes": source.length}, lines)
