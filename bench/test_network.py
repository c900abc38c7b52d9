"""Owns: the guest's network through this package, the reference's loop, socat and nothing at all.

Must not know: how a relay works.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import network
import pytest
from arena import GIB, MIB, OURS, REFERENCE, SOCAT
from network import DIRECT

from nitro_vsock.cli.compare import contest

WAYS = {"to the guest": "gathered", "from the guest": "single"}
"""How frames are written: by passt as many as 64 KiB hold, by the guest header and frame each."""
PING_BYTES = 64
IDLE_SECONDS = 10
IDLE_SESSIONS = 64


def carry(arena, wire, direction, size, *options):
    """Carry frames one way, every byte counted; return seconds and the relay's processor time."""
    ends = (wire.backend, wire.guest) if direction == "to the guest" else (wire.guest, wire.backend)
    before = network.relay_cpu(wire)
    sent, got = network.converse(
        arena,
        (ends[0], ("send", WAYS[direction], size, *options)),
        (ends[1], ("receive", size, *options)),
    )
    assert (sent["bytes"], sent["digest"]) == (got["bytes"], got["digest"])
    seconds = (got["finished_ns"] - sent["began_ns"]) / 1e9
    return seconds, network.relay_cpu(wire) - before


def in_turn(benchmark, wires, rounds, measure):
    """Let everybody have a turn a round, ours last; return the samples by name."""
    samples = {name: [] for name in wires}

    def turn(name):
        samples[name].append(measure(wires[name]))

    def others():
        for name in wires:
            if name != OURS:
                turn(name)

    benchmark.pedantic(turn, (OURS,), setup=others, rounds=rounds, iterations=1)
    return samples


def ratio(samples, name, which=0):
    """Return how many times as much of something another needs, pair by pair: the median."""
    ours, theirs = ([sample[which] for sample in samples[key]] for key in (OURS, name))
    return contest.ratio(ours, theirs)


def throughput(benchmark, figure, arena, direction, size, rounds):
    """Measure one direction beside the others."""
    prefix = "vsock network" if arena.transport == "vsock" else "network"
    with network.wires(arena) as wires:
        for wire in wires.values():
            carry(arena, wire, direction, 4 * MIB, "digest")
        samples = in_turn(
            benchmark, wires, rounds, lambda wire: carry(arena, wire, direction, size)
        )
    benchmark.extra_info.update(
        transport=arena.transport,
        kernel=os.uname().release,
        reference=arena.language,
        size=size,
        direction=direction,
        network_throughput={
            name: {
                "mib_per_second": round(size / MIB / median(of[0] for of in theirs), 1),
                "ours_over_theirs": round(ratio(samples, name), 3),
                "cpu_per_gib": round(median(of[1] for of in theirs) * GIB / size, 3),
            }
            for name, theirs in samples.items()
        },
    )
    for name in (REFERENCE, SOCAT, DIRECT):
        if name in samples:
            figure(f"{prefix}, {direction}: against {name}", ratio(samples, name))
    if SOCAT in samples:
        cpu = ratio(samples, SOCAT, 1)
        figure(f"{prefix}, {direction}: processor time, socat over ours", cpu)


def latency(benchmark, figure, arena, way, pings, rounds):
    """Measure a small frame there and back beside the others."""
    prefix = "vsock network" if arena.transport == "vsock" else "network"

    def measure(wire):
        told, _ = network.converse(
            arena,
            (wire.guest, ("ping", way, PING_BYTES, pings)),
            (wire.backend, ("echo", PING_BYTES, pings)),
        )
        return told["median_us"], told["p99_us"]

    with network.wires(arena) as wires:
        for wire in wires.values():
            measure(wire)
        samples = in_turn(benchmark, wires, rounds, measure)
    benchmark.extra_info.update(
        transport=arena.transport,
        kernel=os.uname().release,
        reference=arena.language,
        way=way,
        network_latency={
            name: {
                "pings": pings * rounds,
                "median_us": round(median(of[0] for of in theirs), 1),
                "p99_us": round(median(of[1] for of in theirs), 1),
                "theirs_over_ours": round(ratio(samples, name), 3),
            }
            for name, theirs in samples.items()
        },
    )
    for name in (REFERENCE, SOCAT, DIRECT):
        if name in samples:
            figure(f"{prefix}, latency, {way} writes: {name} over ours", ratio(samples, name))


@pytest.mark.parametrize("direction", WAYS)
def test_network_throughput(benchmark, figure, unix, quick, direction):
    """Frames of 1514 bytes, one way."""
    size = (256 if direction == "to the guest" else 64) * MIB
    throughput(benchmark, figure, unix, direction, size, 7 if quick else 21)


@pytest.mark.parametrize("way", ["gathered", "single"])
def test_network_latency(benchmark, figure, unix, quick, way):
    """A frame of 64 bytes there and back."""
    latency(benchmark, figure, unix, way, 1000, 9 if quick else 31)


@pytest.mark.vsock
@pytest.mark.parametrize("direction", WAYS)
def test_vsock_network_throughput(benchmark, figure, vsock, direction):
    """The guest's end over vsock loopback, the backend's a Unix socket."""
    throughput(benchmark, figure, vsock, direction, 16 * MIB, 5)


@pytest.mark.vsock
def test_vsock_network_latency(benchmark, figure, vsock):
    """The same for a small frame."""
    latency(benchmark, figure, vsock, "gathered", 300, 5)


def traced_calls(pid, report, seconds):
    """Return how many system calls a process makes meanwhile, all threads."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-c", "-o", str(report), "-p", str(pid)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert "attached" in tracer.stderr.readline()
    time.sleep(seconds)
    tracer.send_signal(signal.SIGINT)
    tracer.communicate(timeout=30)
    total = re.search(r"^100\.00\s.*?(\d+)\s+(?:\d+\s+)?total$", report.read_text(), re.M)
    return int(total[1]) if total else 0


@pytest.mark.parametrize(
    "count", [1, pytest.param(IDLE_SESSIONS, marks=pytest.mark.full)], ids=["1", "64"]
)
def test_network_idle_sessions(benchmark, unix, folder, count):
    """Sessions whose programs run and whose networks are silent make no system call."""
    if shutil.which("strace") is None:
        pytest.fail("system calls cannot be counted without strace")
    with (
        tempfile.TemporaryDirectory(prefix="nvn") as place,
        network.ours(unix, Path(place), count) as wires,
    ):
        pid = wires[0].pid
        before = network.relay_cpu(wires[0]), network.times_on_a_processor(pid)
        time.sleep(IDLE_SECONDS)
        after = network.relay_cpu(wires[0]), network.times_on_a_processor(pid)
        calls = benchmark.pedantic(
            traced_calls, (pid, folder / "idle", IDLE_SECONDS), rounds=1, iterations=1
        )
    benchmark.extra_info["network_idle"] = {
        "sessions": count,
        "seconds": IDLE_SECONDS,
        "calls": calls,
        "times_on_a_processor": after[1] - before[1],
        "cpu_seconds": round(after[0] - before[0], 6),
    }
    assert benchmark.extra_info["network_idle"]["times_on_a_processor"] == 0
    assert calls == 0
