"""Owns: how fast an archive reaches its reader, beside every peer, in one run.

Must not know: how an entrant works.
"""

import os

import pytest
from arena import CEILING, GIB, MIB, OURS, REFERENCE, RESIDENT, SOCAT, STANDARD, drop_cache
from conftest import advantage, times

from nitro_vsock.cli.compare import contest

ROUNDS = {MIB: 15, 64 * MIB: 11, 256 * MIB: 5, GIB: 7, 4 * GIB: 5}
FIGURES = {
    CEILING: "unix: against the ceiling",
    "socket.sendfile": "unix: against socket.sendfile",
    "read+sendall": "unix: against read+sendall",
    SOCAT: "unix: against socat",
    REFERENCE: "unix: against the reference way",
}
LARGE = 256 * MIB
"""From here on a ratio says something of the stream and not of how a process starts."""


def note_figures(figure, samples, entrants):
    """Hold the ratios of a large archive against their floors."""
    for name in entrants:
        figure(FIGURES[name], advantage(name, samples[name], samples[OURS]))
    cpu = contest.ratio(
        [sample.cpu for sample in samples[OURS]], [sample.cpu for sample in samples[REFERENCE]]
    )
    figure("unix: processor time, reference way over ours", cpu)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(LARGE, marks=pytest.mark.quick),
        *(pytest.param(size, marks=pytest.mark.full) for size in (MIB, 64 * MIB, GIB, 4 * GIB)),
    ],
)
def test_page_cache_to_a_draining_reader(compare, figure, unix, size):
    """The archive is in page cache; the reader throws the bytes away."""
    archive = unix.archive(size)
    entrants = [unix.ours(archive), *unix.peers(archive), *unix.ceilings(archive)]
    samples = compare(unix, archive, entrants, ROUNDS[size])
    if size >= LARGE:
        note_figures(figure, samples, [name for name in FIGURES if name in samples])
    if size > GIB:
        unix.forget(size)


@pytest.mark.full
@pytest.mark.parametrize("keep", ["fresh memory", "a file"])
def test_page_cache_to_a_storing_reader(compare, unix, folder, keep):
    """The reader stores the bytes in memory made for them, as the guest does, or in a file."""
    archive = unix.archive(GIB)
    entrants = [unix.ours(archive), *unix.peers(archive), *unix.ceilings(archive)]
    options = ["--drain", f"--store={folder / 'stored'}"] if keep == "a file" else ["--seed=0"]
    compare(unix, archive, entrants, 5, *options)


@pytest.mark.full
def test_page_cache_to_a_discarding_reader(compare, unix):
    """The reader lets the kernel throw the bytes away, so that the senders alone count."""
    archive = unix.archive(GIB)
    entrants = [unix.ours(archive), *unix.peers(archive), *unix.ceilings(archive)]
    compare(unix, archive, entrants, 7, "--discard")


@pytest.mark.full
def test_cold_file_to_a_draining_reader(compare, unix):
    """The archive is on disk and not in page cache."""
    archive = unix.archive(GIB)
    os.sync()  # what earlier benchmarks wrote must not be written meanwhile

    def forget_pages():
        for path in (archive.path, archive.wire):
            drop_cache(path)

    entrants = [unix.ours(archive), *unix.peers(archive), next(iter(unix.ceilings(archive)))]
    compare(unix, archive, entrants, 5, before=forget_pages)


@pytest.mark.vsock
def test_vsock_to_a_draining_reader(compare, figure, vsock):
    """AF_VSOCK through loopback: each forced strategy, each peer, what the kernel gives at most."""
    archive = vsock.archive(64 * MIB)
    entrants = [
        vsock.ours(archive),
        *(vsock.ours(archive, strategy) for strategy in ("sendfile", "mmap", "read")),
        *vsock.peers(archive),
        *vsock.ceilings(archive),
    ]
    samples = compare(vsock, archive, entrants, 3)
    peers = [name for name in samples if name in (*STANDARD, SOCAT, REFERENCE)]
    figure(
        "vsock: against the best peer",
        min(advantage(name, samples[name], samples[OURS]) for name in peers),
    )
    forced = [name for name in samples if name.startswith(f"{OURS}: ")]
    figure(
        "vsock: automatic strategy against the best forced one",
        min(contest.ratio(times(OURS, samples[OURS]), times(n, samples[n])) for n in forced),
    )
    assert RESIDENT in samples


@pytest.mark.vsock
def test_vsock_to_a_storing_reader(compare, vsock):
    """The same to a reader that stores the bytes in memory made for them, as the guest does."""
    archive = vsock.archive(64 * MIB)
    compare(vsock, archive, [vsock.ours(archive), *vsock.peers(archive)], 3, "--seed=0")
