"""Owns: the command `bench`. Must not know: how senders are compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from nitro_vsock.cli.compare import comparison
from nitro_vsock.cli.ui import output
from nitro_vsock.cli.ui.options import EPILOG, global_options, uds_option
from nitro_vsock.cli.ui.output import Settings
from nitro_vsock.cli.ui.params import parse_size


@click.command(epilog=EPILOG)
@click.option(
    "--rootfs",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="What to send.  [default: random bytes]",
)
@click.option(
    "--size",
    type=parse_size,
    default="256MiB",
    show_default=True,
    metavar="SIZE",
    help="How much to send, without --rootfs; it takes this much disk, twice with socat.",
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Launches of each."
)
@click.option(
    "--cid",
    type=int,
    metavar="CID",
    help="A real reader's, which connects once for every launch.  [default: a reader of ours]",
)
@uds_option
@global_options
@click.pass_obj
def bench(
    settings: Settings,
    rootfs: Path | None,
    size: int,
    rounds: int,
    cid: int | None,
    uds_path: str | None,
) -> None:
    """Compare senders on this machine, by turns in one run.

    They are this package with each strategy, socket.sendfile, a loop of read and sendall, and socat
    where it is installed. Each runs in a process of its own and sends the same bytes, over AF_VSOCK
    where loopback answers, else over a Unix socket; with --cid, to a reader of yours.
    """
    if uds_path is not None and cid is None:
        raise click.UsageError("--uds-path needs --cid")
    with comparison.arena(size, rootfs, cid, uds_path) as (place, archive, wire):
        output.print_note(f"transport: {place.transport}")
        length = archive.stat().st_size
        rows = comparison.run(
            place,
            comparison.entrants(place, archive, wire),
            length,
            rounds,
            lambda done, total: output.print_note(f"round {done} of {total}"),
        )
    output.print_result(
        settings,
        {
            "transport": place.transport,
            "kernel": os.uname().release,
            "rootfs_bytes": length,
            "rounds": rounds,
            "senders": comparison.as_objects(rows),
        },
        _describe(rows),
    )


def _describe(rows: Sequence[comparison.Row]) -> list[str]:
    """Return a comparison as a table: medians, and our rate over each sender's."""
    head = f"{'sender':24} {'rate':>14} {'cpu s/GiB':>10} {'peak memory':>12} {'auto is':>9}"
    return [head] + [
        f"{row.name:24} {output.format_bytes(row.rate) + '/s':>14} {row.cpu_per_gib:>10.3f} "
        f"{'-' if row.peak is None else output.format_bytes(row.peak):>12} {row.ratio:>8.2f}x"
        for row in rows
    ]
