"""Owns: what a launch costs beside time: memory, system calls, the import.

Must not know: how a sender works.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from statistics import median

import pytest
from arena import GIB, MIB, OURS, Archive
from floors import GROWTH_LIMIT

from nitro_vsock.cli.compare import contest, senders

IMPORTS = {
    "nothing": "pass",
    "socket, cffi": "import socket, cffi",
    "nitro_vsock": "import nitro_vsock",
    "its EnclaveArgsWriter": "from nitro_vsock import EnclaveArgsWriter",
}
ROUNDS = 21
ALLOWED = 1.5


def hole(folder, size):
    """Return an archive that is one hole: as large as you like, and nothing on disk."""
    path = folder / f"hole-{size}"
    with path.open("wb") as file:
        file.truncate(size)
    head = folder / f"head-{size}"
    head.write_bytes(senders.head(size))
    return Archive(path, size, 0, head, None)


def test_peak_memory_by_size(benchmark, unix, folder, quick):
    """The sender's peak does not grow with the archive."""
    sizes = [MIB, GIB] if quick else [MIB, 64 * MIB, GIB, 8 * GIB]
    peaks = {size: [] for size in sizes}

    def run():
        for size in sizes:
            archive = hole(folder, size)
            peaks[size].append(unix.launch(unix.ours(archive), archive).peak)
            archive.path.unlink()

    benchmark.pedantic(run, rounds=3, iterations=1)
    found = {size: int(median(of)) for size, of in peaks.items()}
    benchmark.extra_info["peak_by_size"] = found
    assert found[sizes[-1]] - found[MIB] <= GROWTH_LIMIT


def calls(command, reader, archive):
    """Return how many system calls a sender makes for one launch, its start included."""
    report = archive.path.parent / "strace"
    traced = ["strace", "-f", "-c", "-o", str(report), *command]
    contest.launch(traced, reader, {"received": archive.received})
    return int(re.search(r"^100\.00\s.*?(\d+)\s+(?:\d+\s+)?total$", report.read_text(), re.M)[1])


@pytest.mark.full
def test_system_calls_by_gibibyte(benchmark, unix):
    """Calls for 64 MiB less those for 1 MiB, so that the start of a process does not count."""
    if shutil.which("strace") is None:
        pytest.fail("system calls cannot be counted without strace")
    small, large = unix.archive(MIB), unix.archive(64 * MIB)
    found = {}

    def run():
        pairs = zip(
            [unix.ours(small), *unix.peers(small), *unix.ceilings(small)],
            [unix.ours(large), *unix.peers(large), *unix.ceilings(large)],
            strict=True,
        )
        for one, other in pairs:
            reader = unix.reader("--drain")
            more = calls(other.command, reader, large) - calls(one.command, reader, small)
            found[one.name] = round(more * GIB / (large.size - small.size))

    benchmark.pedantic(run, rounds=1, iterations=1)
    benchmark.extra_info["calls_per_gib"] = found
    assert found[OURS] > 0


def test_import_time(benchmark, figure):
    """A new interpreter that imports the package, against one that imports what it stands on."""
    found = {name: [] for name in IMPORTS}

    def start(name):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTS[name]], check=True, cwd=os.sep)
        found[name].append(time.perf_counter() - began)

    def others():
        for name in IMPORTS:
            if name != "nitro_vsock":
                start(name)

    start("nitro_vsock")  # writes the byte code
    found["nitro_vsock"].clear()
    benchmark.pedantic(start, ("nitro_vsock",), setup=others, rounds=ROUNDS, iterations=1)
    benchmark.extra_info["import_ms"] = {
        name: round(median(of) * 1e3, 1) for name, of in found.items()
    }
    figure(
        "import: socket and cffi, 1.5 times, over ours",
        ALLOWED * contest.ratio(found["nitro_vsock"], found["socket, cffi"]),
    )
