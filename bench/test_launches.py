"""Owns: many launches: the latency of small ones, the throughput of eight at once.

Must not know: how a sender works.
"""

import os
import subprocess
import sys
from statistics import median

import pytest
from arena import GIB, MIB, OURS, PEERS, read_lines

from nitro_vsock.testing import child

SMALL = 10_240
"""Bytes of the archive of a small launch: the smallest tar that GNU tar writes."""
BLOCK = 100
"""Launches of one entrant before the other's turn."""
PLAIN = "plain socket script"
MANY = 8
ENOUGH = 600
"""Seconds after which a process is stuck."""


def small_launches(arena, name, archive):
    """Launch a block of times; return microseconds from the guest's connect to Finished."""
    reading, writing = os.pipe()
    script = [str(PEERS / "small.py"), name, arena.address, str(archive.path), str(BLOCK)]
    guest = subprocess.Popen(
        arena.reader(f"--repeat={BLOCK}"), stdin=reading, stdout=subprocess.PIPE, text=True
    )
    command = [sys.executable, *script]
    sender = child.start(command, stdout=writing)  # a byte a launch, straight to the guest
    os.close(reading)
    os.close(writing)
    said, _ = guest.communicate(timeout=ENOUGH)
    assert sender.wait(timeout=ENOUGH) == 0
    taken = read_lines(said)
    assert len(taken) == BLOCK
    for one in taken:
        assert (one["ok"], one["rootfs_crc"]) == (True, archive.crc), one
    return [(one["finished_ns"] - one["connected_ns"]) / 1e3 for one in taken]


def compare_latency(benchmark, arena, blocks):
    """Let both launch block by block; return the median of the ratios of the blocks' medians."""
    archive = arena.archive(SMALL)
    found = {OURS: [], PLAIN: []}

    def run(name):
        found[name].append(small_launches(arena, name, archive))

    benchmark.pedantic(run, (OURS,), setup=lambda: run(PLAIN), rounds=blocks, iterations=1)
    ratios = [median(p) / median(o) for o, p in zip(found[OURS], found[PLAIN], strict=True)]
    every = {name: sorted(us for block in of for us in block) for name, of in found.items()}
    benchmark.extra_info.update(
        transport=arena.transport,
        kernel=os.uname().release,
        latency={
            name: {
                "launches": len(us),
                "median_us": round(median(us), 1),
                "p99_us": round(us[len(us) * 99 // 100], 1),
            }
            for name, us in every.items()
        },
    )
    return median(ratios)


def test_latency_of_small_launches(benchmark, figure, unix, quick):
    """A launch of 10 KiB, against a script that sends the same bytes in one sendall."""
    ratio = compare_latency(benchmark, unix, 4 if quick else 10)
    figure("small launch: plain socket script over ours", ratio)


@pytest.mark.vsock
def test_vsock_latency_of_small_launches(benchmark, figure, vsock):
    """The same over AF_VSOCK, in fewer blocks: a Python takes seconds to start in the VM."""
    ratio = compare_latency(benchmark, vsock, 2)
    figure("vsock, small launch: plain socket script over ours", ratio)


def at_once(arena, archive, count):
    """Launch from so many threads of one process; return the sum's bytes a second."""
    ports = [2027 + 10 * number for number in range(count)]
    script = [str(PEERS / "many.py"), str(archive.path), *map(arena.address_at, ports)]
    sender = child.start([sys.executable, *script])
    guests = [
        subprocess.Popen(arena.guest("--drain", port=port), stdout=subprocess.PIPE, text=True)
        for port in ports
    ]
    taken = [read_lines(guest.communicate(timeout=ENOUGH)[0])[0] for guest in guests]
    assert sender.wait(timeout=ENOUGH) == 0
    assert all(one["ok"] and one["rootfs_bytes"] == archive.size for one in taken)
    began = min(one["connected_ns"] for one in taken)
    ended = max(one["finished_ns"] for one in taken)
    return count * archive.size / (ended - began) * 1e9


def compare_at_once(benchmark, arena, size, rounds):
    """Send eight at once and one alone in turn; return the median of the sum over the one."""
    archive = arena.archive(size)
    alone, together = [], []
    benchmark.pedantic(
        lambda: together.append(at_once(arena, archive, MANY)),
        setup=lambda: alone.append(at_once(arena, archive, 1)),
        rounds=rounds,
        iterations=1,
    )
    benchmark.extra_info.update(
        transport=arena.transport,
        kernel=os.uname().release,
        at_once={
            "size": archive.size,
            "one_mib_per_second": round(median(alone) / MIB, 1),
            "eight_mib_per_second": round(median(together) / MIB, 1),
        },
    )
    return median(t / a for t, a in zip(together, alone, strict=True))


def test_eight_launches_at_once(benchmark, figure, unix, quick):
    """Eight threads of one process send together; the sum against one launch alone."""
    ratio = compare_at_once(benchmark, unix, 256 * MIB if quick else GIB, 5)
    figure("8 launches at once against one", ratio)


@pytest.mark.vsock
def test_vsock_eight_launches_at_once(benchmark, figure, vsock):
    """The same over AF_VSOCK, where one processor is all that the VM has."""
    ratio = compare_at_once(benchmark, vsock, 16 * MIB, 2)
    figure("vsock, 8 launches at once against one", ratio)
