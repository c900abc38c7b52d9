"""Owns: the options of a benchmark run and the fixtures. Must not know: any figure."""

import os
import tempfile
from pathlib import Path
from statistics import median

import pytest
from arena import GIB, MIB, REFERENCE, Arena, loopback_answers
from floors import FLOORS

from nitro_vsock.cli.compare import contest


def pytest_addoption(parser):
    """Add what a run can be told."""
    group = parser.getgroup("nitro_vsock")
    group.addoption("--quick", action="store_true", help="small archives, few rounds")
    group.addoption("--strategy", default="auto", help="force our strategy, to see a floor hold")


@pytest.fixture(scope="session")
def quick(request):
    """Whether the run is to be short."""
    return request.config.getoption("quick")


@pytest.fixture(scope="session")
def folder():
    """A folder on disk where that is to be had: page cache is what is measured, not tmpfs."""
    place = os.environ.get("TMPDIR", "/var/tmp")
    with tempfile.TemporaryDirectory(prefix="nvb", dir=place) as path:
        yield Path(path)


@pytest.fixture(scope="session")
def unix(folder, request):
    """The arena of Unix sockets."""
    return Arena("unix", folder, request.config.getoption("strategy"))


@pytest.fixture(scope="session")
def vsock(folder, request):
    """The arena of AF_VSOCK."""
    if not loopback_answers():
        pytest.fail("AF_VSOCK cannot be measured: no loopback here. Run `make bench-vsock`.")
    return Arena("vsock", folder, request.config.getoption("strategy"))


@pytest.fixture
def figure(benchmark):
    """Note a ratio in the results, and fail where it is under its floor."""

    def note(name, ratio):
        benchmark.extra_info.setdefault("ratios", {})[name] = round(ratio, 3)
        assert ratio >= FLOORS[name], f"{name}: {ratio:.2f} is under the floor of {FLOORS[name]}"

    return note


@pytest.fixture
def compare(benchmark):
    """Let entrants launch in turn, ours last in each round; return the samples by name.

    What pytest-benchmark times is our launch with both its processes; what counts is in the
    samples, which the reader times.
    """

    def run(arena, archive, entrants, rounds, *reader_options, before=None):
        ours, *others = entrants
        samples = {entrant.name: [] for entrant in entrants}
        for entrant in entrants:
            arena.check_bytes(entrant, archive)

        def launch(entrant):
            if before is not None:
                before()
            samples[entrant.name].append(arena.launch(entrant, archive, *reader_options))

        def launch_others():
            for entrant in others:
                launch(entrant)

        benchmark.pedantic(lambda: launch(ours), setup=launch_others, rounds=rounds, iterations=1)
        benchmark.extra_info.update(
            transport=arena.transport,
            kernel=os.uname().release,
            reference=arena.language,
            size=archive.size,
            rounds=rounds,
            entrants={
                name: summary(name, theirs, samples[ours.name], archive.size)
                for name, theirs in samples.items()
            },
        )
        return samples

    return run


def times(name, samples):
    """Return what counts as the duration: for the reference, reading the file belongs to it."""
    return [sample.whole if name == REFERENCE else sample.seconds for sample in samples]


def advantage(name, theirs, ours):
    """Return how many times as long they take, pair by pair: the median."""
    ours = [sample.whole if name == REFERENCE else sample.seconds for sample in ours]
    return contest.ratio(ours, times(name, theirs))


def summary(name, theirs, ours, size):
    """Return the medians of an entrant."""
    peaks = [sample.peak for sample in theirs if sample.peak is not None]
    return {
        "mib_per_second": round(size / MIB / median(times(name, theirs)), 1),
        "cpu_per_gib": round(median(sample.cpu for sample in theirs) * GIB / size, 4),
        "peak": int(median(peaks)) if peaks else None,
        "ours_over_theirs": round(advantage(name, theirs, ours), 3),
    }
