"""Owns: how fast root file systems travel that are not ready archives, and how they are measured.

A duration runs from the word to begin to the reader's last byte, so that planning counts.

Must not know: how an entrant works.
"""

import hashlib
import os
import shutil
import struct
import sys
import tarfile
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from subprocess import PIPE

import pytest
import tree_maker
from arena import GIB, MIB, OURS, PEERS, REFERENCE, Archive, compile_tree_reference
from floors import GROWTH_LIMIT, TREE_PEAK_LIMIT

from nitro_vsock import EnclaveArgsWriter, Rootfs, measure
from nitro_vsock.cli.compare import contest, senders
from nitro_vsock.cli.compare.contest import Entrant
from nitro_vsock.rootfs.directory import AHEAD, STAGE_BYTES
from nitro_vsock.testing import child

TAR_SOCAT = "tar | socat"
TARFILE = "tarfile"
READY = "ready tar"
CALLS = "ceiling: a call for each member"
FIGURES = {
    TAR_SOCAT: "tree: against tar | socat",
    TARFILE: "tree: against tarfile",
    REFERENCE: "tree: against the reference way",
}
MEMBERS = 8
"""Files of an archive of large members."""
BLOCK = tarfile.BLOCKSIZE
CHUNK = 2048
"""Bytes that PCR16 is extended with at once."""
READ = 512 << 10
"""Bytes that the bare loop reads at once: what suits it best."""


@dataclass(frozen=True)
class Offer:
    """An entrant and what it says that it sends; the CRC is None where only the length counts."""

    entrant: Entrant
    archive: Archive


@dataclass(frozen=True)
class Tree:
    """A tree on disk. Its folder is called rootfs, so that nobody needs to rename members."""

    path: Path
    made: tree_maker.Made


def counted(command):
    """Return length and CRC of what a command writes to its standard output."""
    size = crc = 0
    with child.start([str(part) for part in command], stdout=PIPE) as process:
        while data := process.stdout.read(MIB):
            size += len(data)
            crc = zlib.crc32(data, crc)
    assert process.returncode == 0, command
    return size, crc


def described(folder, path, size, crc):
    """Return what a reader is to expect, with the head that a peer sends before it."""
    head = folder / f"head-{size}"
    head.write_bytes(senders.head(size))
    return Archive(path, size, crc, head, None)


def packed(*source, to=None):
    """Return length and CRC of what `nitro-vsock pack` writes; `to` keeps it."""
    command = child.python_command("nitro_vsock", "pack", *map(str, source), "--output")
    if to is None:
        return counted([*command, "-"])
    with child.start([*command, str(to)], stdout=PIPE) as process:
        process.communicate()
    assert process.returncode == 0
    return counted(["cat", to])


@pytest.fixture(scope="session")
def tree(folder, quick):
    """The tree that counts."""
    path = folder / "tree" / "rootfs"
    path.parent.mkdir()
    made = tree_maker.make(path, *((5_000, 200 * MIB) if quick else (100_000, 4 * GIB)))
    return Tree(path, made)


@pytest.fixture
def race(benchmark, unix, quick):
    """Let entrants launch in turn, ours last in each round; return the samples by name."""

    def run(ours, *others):
        offers = (ours, *others)
        samples = {offer.entrant.name: [] for offer in offers}
        for offer in offers:
            if offer.archive.crc is not None:
                unix.check_bytes(offer.entrant, offer.archive)

        def launch(offer):
            samples[offer.entrant.name].append(unix.launch(offer.entrant, offer.archive))

        def launch_others():
            for offer in others:
                launch(offer)

        rounds = 3 if quick else 5
        benchmark.pedantic(launch, (ours,), setup=launch_others, rounds=rounds, iterations=1)
        benchmark.extra_info.update(
            transport=unix.transport,
            kernel=os.uname().release,
            size=ours.archive.size,
            rounds=rounds,
            entrants={
                offer.entrant.name: summary(
                    samples[offer.entrant.name], samples[ours.entrant.name], offer.archive.size
                )
                for offer in offers
            },
        )
        return samples

    return run


def advantage(samples, name):
    """Return how many times as long they take, pair by pair: the median."""
    ours, theirs = ([sample.whole for sample in samples[each]] for each in (OURS, name))
    return contest.ratio(ours, theirs)


def summary(theirs, ours, size):
    """Return the medians of an entrant."""
    whole = median(sample.whole for sample in theirs)
    return {
        "mib_per_second": round(size / MIB / whole, 1),
        "seconds": round(whole, 4),
        "seconds_from_connect": round(median(sample.seconds for sample in theirs), 4),
        "cpu_per_gib": round(median(sample.cpu for sample in theirs) * GIB / size, 4),
        "peak": int(median(sample.peak for sample in theirs)),
        "ours_over_theirs": round(
            contest.ratio([one.whole for one in ours], [one.whole for one in theirs]), 3
        ),
        "bytes": size,
    }


def named(arena, name, archive):
    """Return the package as an entrant of another name."""
    return Offer(Entrant(name, arena.ours(archive).command), archive)


def tree_offers(arena, folder, path):
    """Give everybody who can send a tree, ours first."""
    yield named(arena, OURS, described(folder, path, *packed(path)))
    if shutil.which("socat"):
        size, crc = counted(["tar", "--format=gnu", "-C", path.parent, "-c", path.name])
        archive = described(folder, path, size, crc)
        listener = f"UNIX-LISTEN:{arena.address.removeprefix('unix:')}"
        command = arena.metered(PEERS / "tar_socat.sh", archive.head, path, listener)
        yield Offer(Entrant(TAR_SOCAT, command), archive)
    peer = [sys.executable, str(PEERS / "tarfile_peer.py")]
    size, crc = counted([*peer, "pack", path])
    archive = described(folder, path, size, crc)
    command = [*peer, "stream", arena.address, str(path), str(size)]
    yield Offer(Entrant(TARFILE, command), archive)
    yield reference_offer(arena, folder, path, archive, peer)


def reference_offer(arena, folder, path, archive, peer):
    """Give the reference way: an archive in memory, by Rust's library, else by Python's."""
    program = compile_tree_reference(folder)
    if program is None:
        return Offer(Entrant(REFERENCE, [*peer, "memory", arena.address, str(path)]), archive)
    archive = described(folder, path, *counted([program, "pack", path]))
    return Offer(Entrant(REFERENCE, arena.reference(program, path)), archive)


def test_tree_to_a_draining_reader(benchmark, race, figure, unix, folder, tree):
    """A tree with sizes as in a real /usr, in page cache."""
    samples = race(*tree_offers(unix, folder, tree.path))
    benchmark.extra_info["tree"] = vars(tree.made)
    benchmark.extra_info["reference"] = "Rust" if (folder / "cargo").exists() else "Python"
    for name in FIGURES:
        if name in samples:
            figure(FIGURES[name], advantage(samples, name))


def test_peak_memory_by_size_of_files(benchmark, unix, folder, tree, quick):
    """The sender's peak stays in its limit and does not grow with the size of the files."""
    small = folder / "small"
    made = tree_maker.make(small, *((5_000, 200 * MIB) if quick else (100_000, 4 * GIB)), shrink=10)
    assert made.files == tree.made.files
    offers = {
        what.made.size: named(unix, OURS, described(folder, what.path, *packed(what.path)))
        for what in (Tree(small, made), tree)
    }
    peaks = {size: [] for size in offers}

    def run():
        for size, offer in offers.items():
            peaks[size].append(unix.launch(offer.entrant, offer.archive).peak)

    benchmark.pedantic(run, rounds=3, iterations=1)
    shutil.rmtree(small)
    found = {size: int(median(of)) for size, of in peaks.items()}
    benchmark.extra_info.update(files=made.files, peak_by_size_of_files=found)
    assert max(found.values()) <= TREE_PEAK_LIMIT
    # A quick tree with small files has fewer pieces than may be made ahead.
    unused = AHEAD * STAGE_BYTES if quick else 0
    assert found[tree.made.size] - found[made.size] <= GROWTH_LIMIT + unused


def test_one_large_file_in_a_directory(race, figure, unix, folder, quick):
    """A directory with one file, against the same bytes as an archive that is ready."""
    path, ready = folder / "one", folder / "one.tar"
    path.mkdir()
    with (path / "data").open("wb") as file:
        fill(file, (512 * MIB) if quick else 4 * GIB)
    size, crc = packed(path, to=ready)
    samples = race(
        named(unix, OURS, described(folder, path, size, crc)),
        named(unix, READY, described(folder, ready, size, crc)),
    )
    shutil.rmtree(path)
    ready.unlink()
    figure("tree: one large file, ready tar over ours", advantage(samples, READY))


def fill(file, size):
    """Write bytes of which no two MiB are alike."""
    block = bytearray(os.urandom(MIB))
    for number in range(size // MIB):
        block[:8] = number.to_bytes(8, "big")
        file.write(block)
    file.flush()
    os.fdatasync(file.fileno())


def export(path, size, prefix=""):
    """Write an archive of a few large members, in PAX format as `docker export` does.

    Returns:
        Offset and length of each member's data.
    """
    ranges = []
    with path.open("wb") as file:
        for number in range(MEMBERS):
            member = tarfile.TarInfo(f"{prefix}layer-{number}")
            member.size, member.mtime = size // MEMBERS, 1_700_000_000.5
            file.write(member.tobuf(tarfile.PAX_FORMAT))
            ranges.append((file.tell(), member.size))
            fill(file, member.size)
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE or tarfile.RECORDSIZE))
    return ranges


def foreign_offers(arena, folder, path):
    """Give us with another tool's tar, and with the same file as if it were ready."""
    size, crc = packed(path)
    yield named(arena, OURS, described(folder, f"{senders.FOREIGN}{path}", size, crc))
    yield named(arena, READY, described(folder, path, *counted(["cat", path])))


def test_foreign_tar_of_large_members(race, figure, unix, folder, quick):
    """Every member of another tool's tar gets a new header."""
    path = folder / "export.tar"
    export(path, (512 * MIB) if quick else 4 * GIB)
    samples = race(*foreign_offers(unix, folder, path))
    path.unlink()
    figure("from_tar: large members, ready tar over ours", advantage(samples, READY))


def members(path):
    """Return offset and padded length of each member's data."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            size = member.size if member.isreg() else 0
            yield member.offset_data, size + -size % BLOCK
            tar.members = []


def test_foreign_tar_of_small_members(benchmark, race, figure, unix, folder, tree):
    """The tree as another tool's tar; beside it, two calls of the kernel for each member."""
    path, ranges = folder / "foreign.tar", folder / "ranges"
    with path.open("wb") as file:
        command = ["tar", "--format=gnu", "-C", str(tree.path), "-c", "."]
        assert child.start(command, stdout=file).wait() == 0
        os.fdatasync(file.fileno())
    found = list(members(path))
    ranges.write_bytes(b"".join(struct.pack("=QQ", *each) for each in found))
    size = sum(BLOCK + length for _, length in found)
    archive = described(folder, path, size, None)
    calls = unix.metered(
        folder / "ceiling", "ranges", unix.address, archive.head, archive.path, ranges
    )
    samples = race(*foreign_offers(unix, folder, path), Offer(Entrant(CALLS, calls), archive))
    path.unlink()
    benchmark.extra_info["members"] = len(found)
    figure("from_tar: small members, ready tar over ours", advantage(samples, READY))
    figure("from_tar: small members, a call for each over ours", advantage(samples, CALLS))


def bare_memory(data, ranges):
    """Return PCR16 by nothing but hashlib."""
    sha384, pcr = hashlib.sha384, bytes(48)
    for begin, length in ranges:
        for at in range(begin, begin + length, CHUNK):
            pcr = sha384(pcr + data[at : at + CHUNK]).digest()
    return pcr


def bare_file(path, ranges):
    """Return PCR16 by nothing but hashlib and reads."""
    sha384, pcr = hashlib.sha384, bytes(48)
    buffer = memoryview(bytearray(READ))
    with path.open("rb", buffering=0) as file:
        for begin, length in ranges:
            for start in range(begin, begin + length, READ):
                got = os.preadv(file.fileno(), [buffer], start)
                assert got == READ or start + got >= begin + length
                for at in range(0, min(got, begin + length - start), CHUNK):
                    pcr = sha384(pcr + buffer[at : at + CHUNK]).digest()
    return pcr


def ours(rootfs):
    """Return PCR16 by the package."""
    return measure(EnclaveArgsWriter(rootfs, "/app", ["/app"], ["PATH=/"])).pcr16


def test_pcr16_against_a_bare_loop(benchmark, figure, folder, quick):
    """The package's measurement, parsing included, against hashlib over chunks that are known."""
    size = (64 if quick else 256) * MIB
    path = folder / "measured.tar"
    ranges = export(path, size, "rootfs/")
    data = path.read_bytes()
    ways = {
        "memory": (lambda: ours(Rootfs.from_bytes(data))),
        "file": (lambda: ours(Rootfs.from_file(path))),
        "bare memory": partial(bare_memory, memoryview(data), ranges),
        "bare file": partial(bare_file, path, ranges),
    }
    assert len({way() for way in ways.values()}) == 1
    found = {name: [] for name in ways}

    def run(*names):
        for name in names:
            began = time.perf_counter()
            ways[name]()
            found[name].append(time.perf_counter() - began)

    benchmark.pedantic(
        run,
        ("memory", "file"),
        setup=lambda: run("bare memory", "bare file"),
        rounds=7 if quick else 9,
        iterations=1,
    )
    path.unlink()
    benchmark.extra_info["pcr16"] = {
        "size": size,
        "mib_per_second": {name: round(size / MIB / median(of), 1) for name, of in found.items()},
    }
    figure(
        "PCR16: hashlib over ours, from memory",
        contest.ratio(found["memory"], found["bare memory"]),
    )
    figure(
        "PCR16: hashlib over ours, from a file", contest.ratio(found["file"], found["bare file"])
    )
