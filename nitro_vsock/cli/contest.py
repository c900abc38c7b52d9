"""Owns: running senders in turn against the same reader, and the ratios between them.

Must not know: how a sender works, or how results look.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from nitro_vsock.cli import child
from nitro_vsock.cli.failures import ContestError

_ENOUGH: Final = 600.0
"""Seconds after which a process is stuck."""


@dataclass(frozen=True)
class Entrant:
    """A sender.

    Attributes:
        name: in the results.
        command: of a process that says "ready", waits for a line, does one launch and prints a
            JSON object with `cpu`, `peak` and perhaps `seconds`.
    """

    name: str
    command: Sequence[str]


@dataclass(frozen=True)
class Sample:
    """One launch.

    Attributes:
        seconds: from the reader's connect to its last byte; from the ready byte to the close where
            the reader is not ours.
        whole: from the word to begin to the reader's last byte, so with all that the sender does
            before it listens.
        cpu: the sender's processor seconds, user and system.
        peak: of the sender's resident memory, in bytes; None where nobody measured it.
    """

    seconds: float
    whole: float
    cpu: float
    peak: int | None


Samples = Mapping[str, Sequence[Sample]]


def launch(
    sender: Sequence[str], reader: Sequence[str] | None, expect: Mapping[str, int]
) -> Sample:
    """Do one launch between two processes.

    Args:
        sender: its command.
        reader: its command; it too waits for a line, and prints a JSON object with `connected_ns`
            and `finished_ns`. None: somebody else reads.
        expect: what else must be in that object: the bytes, or their digest.

    Raises:
        ContestError: a process failed, or other bytes arrived.
    """
    with _process(sender) as sending:
        _expect_ready(sending, sender)
        if reader is None:
            began = time.monotonic()
            said = _finish(sending, sender)
            return Sample(said["seconds"], time.monotonic() - began, said["cpu"], said["peak"])
        with _process(reader) as reading:
            began = time.monotonic()
            _go(sending)
            _go(reading)
            said = _finish(sending, sender)
            took = _finish(reading, reader)
    if any(took[key] != value for key, value in expect.items()):
        raise ContestError(f"{' '.join(sender)}: {took} arrived in place of {expect}")
    return Sample(
        (took["finished_ns"] - took["connected_ns"]) / 1e9,
        took["finished_ns"] / 1e9 - began,
        said["cpu"],
        said["peak"],
    )


def race(
    entrants: Sequence[Entrant],
    rounds: int,
    reader: Sequence[str] | None,
    expect: Mapping[str, int],
) -> Iterator[tuple[str, Sample]]:
    """Let each entrant launch once a round, in turn, so that all meet the same weather."""
    for _ in range(rounds):
        for entrant in entrants:
            yield entrant.name, launch(entrant.command, reader, expect)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return how many times as much theirs is, pair by pair: the median."""
    return median(their / our for our, their in zip(ours, theirs, strict=True))


@contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = child.start(list(command), stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _expect_ready(process: subprocess.Popen[str], command: Sequence[str]) -> None:
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    if process.stdout.readline() != "ready\n":
        raise ContestError(f"{' '.join(command)}: {process.communicate(timeout=_ENOUGH)[1]}")


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None  # noqa: S101 - a pipe was asked for
    process.stdin.write("go\n")
    process.stdin.flush()


def _finish(process: subprocess.Popen[str], command: Sequence[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=_ENOUGH)
    except subprocess.TimeoutExpired as error:
        raise ContestError(f"{' '.join(command)}: stuck") from error
    if process.returncode:
        raise ContestError(f"{' '.join(command)}: exit code {process.returncode}: {out}{err}")
    said: dict[str, Any] = json.loads(out.splitlines()[-1])
    return said
