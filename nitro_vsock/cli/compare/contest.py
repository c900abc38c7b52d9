"""Owns: running senders in turn against the same reader, and the ratios between them.

Must not know: how a sender works, or how results look.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from nitro_vsock.cli.ui.failures import ContestError
from nitro_vsock.testing import child

_ENOUGH: Final = 600.0
"""Seconds after which a process is stuck."""

_MOMENT: Final = 1.0
"""Seconds that a process gets to say what it has to say of another's failure."""


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
    sender: Sequence[str],
    reader: Sequence[str] | None,
    expect: Mapping[str, int],
    enough: float = _ENOUGH,
) -> Sample:
    """Do one launch between two processes.

    Args:
        sender: its command.
        reader: its command; it too waits for a line, and prints a JSON object with `connected_ns`
            and `finished_ns` at its end, nothing before. None: somebody else reads.
        expect: what else must be in that object: the bytes, or their digest.
        enough: seconds after which a process is stuck.

    Raises:
        ContestError: a process failed, or other bytes arrived.
    """
    with _process(sender) as sending:
        _expect_ready(sending, enough)
        if reader is None:
            began = time.monotonic()
            _go(sending)
            [said] = _finish([sending], enough)
            return Sample(said["seconds"], time.monotonic() - began, said["cpu"], said["peak"])
        with _process(reader) as reading:
            began = time.monotonic()
            _go(sending)
            _go(reading)
            said, took = _finish([sending, reading], enough)
    if any(took.get(key) != value for key, value in expect.items()):
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
    """Start a process; it and all that it has started are gone when the context ends."""
    pipe = subprocess.PIPE
    process = child.start(
        list(command), stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        _kill(process)
        process.communicate()


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _expect_ready(process: subprocess.Popen[str], enough: float) -> None:
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        heard = bool(selector.select(enough))
    said = process.stdout.readline() if heard else "never ready"
    if said != "ready\n":
        raise _failed(process, said, _MOMENT if heard else 0)


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None  # noqa: S101 - a pipe was asked for
    with suppress(BrokenPipeError):  # it has ended; it will be asked why
        process.stdin.write("go\n")
        process.stdin.flush()


def _finish(processes: Sequence[subprocess.Popen[str]], enough: float) -> list[dict[str, Any]]:
    """Return what they say at their ends.

    Where one fails, the others would wait for it: they get but a moment.
    """
    results: dict[int, dict[str, Any]] = {}
    problems: list[str] = []
    with selectors.DefaultSelector() as selector:
        for process in processes:
            assert process.stdout is not None  # noqa: S101 - a pipe was asked for
            selector.register(process.stdout, selectors.EVENT_READ, process)
        while selector.get_map():
            ended = selector.select(_MOMENT if problems else enough)
            if not ended:
                break
            for key, _ in ended:
                selector.unregister(key.fileobj)
                try:
                    results[key.data.pid] = _result(key.data, enough)
                except ContestError as error:
                    problems.append(str(error))
        stuck = [key.data for key in selector.get_map().values()]
    if problems or stuck:
        raise ContestError("; ".join(problems) or str(_failed(stuck[0], "stuck", 0)))
    return [results[process.pid] for process in processes]


def _result(process: subprocess.Popen[str], enough: float) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=enough)
    except subprocess.TimeoutExpired:
        raise _failed(process, "stuck", 0) from None
    try:
        if process.returncode == 0:
            result: dict[str, Any] = json.loads(out.splitlines()[-1])
            return result
    except (ValueError, IndexError):
        pass
    raise ContestError(f"{_name(process)}: exit code {process.returncode}: {out}{err}")


def _failed(process: subprocess.Popen[str], what: str, patience: float) -> ContestError:
    """End a process; return an error with its words."""
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=patience)
    _kill(process)
    out, err = process.communicate()
    return ContestError(f"{_name(process)}: {what} {out}{err}")


def _name(process: subprocess.Popen[str]) -> str:
    assert isinstance(process.args, list)  # noqa: S101 - see _process
    return " ".join(process.args)
