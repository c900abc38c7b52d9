"""Owns: a plugin for bench/ in which no process runs: how long a launch takes is said here.

With it, a test of the floors knows what the benchmark will measure. Knows nothing of the floors.
"""

import arena
import pytest

from nitro_vsock.cli.compare import contest

SECONDS = {"auto": 1.0, "read": 4.0, "ceiling": 1.0}
"""What a launch takes by its command; whatever else is compared takes SLOW."""
SLOW = 12.0


def launch(sender, reader, expect, enough=None):
    """Return the sample of a launch that did not take place."""
    took = next((took for name, took in SECONDS.items() if _names(sender, name)), SLOW)
    return contest.Sample(seconds=took, whole=took, cpu=took, peak=1 << 20)


def _names(command, name):
    return any(part == name or part.endswith(f"/{name}") for part in command)


def make_archive(folder, size, *, wire):
    """Return an archive without a file."""
    path = folder / "archive"
    return arena.Archive(path, size, 0, path, path if wire else None)


@pytest.fixture(autouse=True)
def pretend(monkeypatch):
    """Launch nothing, write nothing, compile nothing."""
    monkeypatch.setattr(contest, "launch", launch)
    monkeypatch.setattr(arena, "make_archive", make_archive)
    monkeypatch.setattr(arena.Arena, "language", "C")
