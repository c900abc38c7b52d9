"""Owns: the comparison a user runs: which senders, over which transport, and what is made of it.

Must not know: how a sender works.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from nitro_vsock.cli.compare import contest, samples, senders
from nitro_vsock.cli.compare.contest import Entrant, Sample
from nitro_vsock.cli.compare.senders import READER, SENDERS, SOCAT, TAIL
from nitro_vsock.launch import service_address
from nitro_vsock.protocol import VMADDR_CID_ANY, VMADDR_CID_LOCAL, VsockPortOffset
from nitro_vsock.testing import child
from nitro_vsock.testing.loopback import loopback_problem
from nitro_vsock.transport import Strategy, UnixAddress

_MODULE: Final = "nitro_vsock.cli.compare.senders"

_STRATEGIES: Final = (Strategy.AUTO, Strategy.SENDFILE, Strategy.MMAP, Strategy.READ)

_FOLDER_ON_DISK: Final = "/var/tmp"  # noqa: S108 - only a place for a folder of a random name

GIB: Final = 1 << 30


@dataclass(frozen=True)
class Place:
    """Where the senders listen and the reader connects.

    Attributes:
        transport: for people.
        sender: address to listen at.
        reader: address to connect to; None where the user's own reader does.
    """

    transport: str
    sender: str
    reader: str | None


@dataclass(frozen=True)
class Row:
    """One sender's medians.

    Attributes:
        name: of the sender.
        rate: bytes per second.
        cpu_per_gib: the sender's processor seconds for a GiB.
        peak: of its resident memory, bytes; None where it was not measured.
        ratio: how many times our rate is theirs, pair by pair.
    """

    name: str
    rate: float
    cpu_per_gib: float
    peak: int | None
    ratio: float


def choose_place(cid: int | None, uds_path: str | None, folder: str) -> Place:
    """Return where to run: at a real reader's, else over loopback, else a Unix socket.

    Args:
        cid: whose reader connects, once for every launch; None for a reader of ours.
        uds_path: base path of that reader's hybrid vsock, where it uses one.
        folder: for a socket of ours.

    Raises:
        InvalidArgumentError: no enclave has this CID, or the path gets too long.
    """
    offset = VsockPortOffset.ARGS_READER
    if cid is not None:
        # The senders run in another folder.
        base = None if uds_path is None else Path(uds_path).absolute()
        address = service_address(cid, offset, base)
        where = f"vsock:{VMADDR_CID_ANY}:{cid + offset}"
        if isinstance(address, UnixAddress):
            where = f"unix:{address.path}"
        return Place(f"the reader of CID {cid}", where, None)
    if loopback_problem() is None:
        port = 5000 + 5 * secrets.randbelow(1 << 28) + offset
        return Place(
            "AF_VSOCK, through loopback",
            f"vsock:{VMADDR_CID_ANY}:{port}",
            f"vsock:{VMADDR_CID_LOCAL}:{port}",
        )
    where = f"unix:{Path(folder, 'v.sock')}_{17 + offset}"
    return Place("a Unix socket, since AF_VSOCK loopback is not here", where, where)


@contextmanager
def arena(
    size: int, rootfs: Path | None, cid: int | None, uds_path: str | None
) -> Iterator[tuple[Place, Path, Path | None]]:
    """Give the place, the archive, and a file with the whole stream where socat can send it."""
    home = _FOLDER_ON_DISK if "TMPDIR" not in os.environ else None
    with tempfile.TemporaryDirectory(prefix="nitro_vsock-", dir=home) as folder:
        place = choose_place(cid, uds_path, folder)
        archive = rootfs.resolve() if rootfs else Path(folder, "archive.tar")
        if rootfs is None:
            samples.noise(archive, size)
        wire = None
        # To a reader that is not ours socat cannot say how long it took.
        if shutil.which("socat") and place.reader is not None:
            wire = Path(folder, "wire")
            with wire.open("wb") as out, archive.open("rb") as file:
                out.write(senders.head(archive.stat().st_size))
                shutil.copyfileobj(file, out, 1 << 20)
                out.write(TAIL)
        with _no_socket_left(place.sender):
            yield place, archive, wire


@contextmanager
def _no_socket_left(address: str) -> Iterator[None]:
    """Remove the socket file of a sender that was ended while it listened."""
    kind, _, where = address.partition(":")
    ours = kind == "unix" and not Path(where).exists()
    try:
        yield
    finally:
        if ours:
            Path(where).unlink(missing_ok=True)


def entrants(place: Place, archive: Path, wire: Path | None) -> list[Entrant]:
    """Return the senders, ours with the automatic strategy first."""

    def command(name: str, what: Path) -> Entrant:
        return Entrant(name, child.python_command(_MODULE, name, place.sender, str(what)))

    found = [command(strategy.value, archive) for strategy in _STRATEGIES]
    found += [command(name, archive) for name in SENDERS if name != SOCAT]
    return found + ([command(SOCAT, wire)] if wire else [])


def run(
    place: Place,
    field: Sequence[Entrant],
    size: int,
    rounds: int,
    show: Callable[[int, int], object],
) -> list[Row]:
    """Let the senders launch in turn; return their medians.

    Args:
        place: where.
        field: the senders, ours first.
        size: of the archive.
        rounds: launches of each.
        show: called with rounds done and in all.

    Raises:
        ContestError: a process failed, or the bytes were not all there.
    """
    received = len(senders.head(size)) - 1 + size + len(TAIL)
    reader = place.reader and child.python_command(_MODULE, READER, place.reader, str(received))
    expect = {"received": received} if reader else {}
    took: dict[str, list[Sample]] = {entrant.name: [] for entrant in field}
    for number, (name, sample) in enumerate(contest.race(field, rounds, reader or None, expect), 1):
        took[name].append(sample)
        if number % len(field) == 0:
            show(number // len(field), rounds)
    ours = [sample.seconds for sample in took[field[0].name]]
    return [_row(name, of, size, ours) for name, of in took.items()]


def _row(name: str, took: Sequence[Sample], size: int, ours: Sequence[float]) -> Row:
    times = [sample.seconds for sample in took]
    peaks = [sample.peak for sample in took if sample.peak is not None]
    label = f"nitro_vsock: {name}" if name in set(Strategy) else name
    return Row(
        label,
        size / median(times),
        median(sample.cpu for sample in took) * GIB / size,
        int(median(peaks)) if peaks else None,
        contest.ratio(ours, times),
    )


def as_objects(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows for machines."""
    return [
        {
            "sender": row.name,
            "bytes_per_second": round(row.rate),
            "cpu_seconds_per_gib": round(row.cpu_per_gib, 4),
            "peak_bytes": row.peak,
            "auto_over_this": round(row.ratio, 3),
        }
        for row in rows
    ]
