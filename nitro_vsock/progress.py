"""Owns: how far a stream is, and what a progress callback is told and how often.

Must not know: what is streamed or by which call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from nitro_vsock.errors import InvalidArgumentError, Stage

REPORT_INTERVAL = 0.1
"""Seconds between two calls of a progress callback, at least."""


@dataclass(frozen=True)
class Progress:
    """A moment of a stream.

    Attributes:
        stage: what is going on.
        bytes_done: bytes through so far, frames included.
        bytes_total: bytes of the whole stream; None while a reader has not seen the length yet.
        seconds: since the stream began.
        rate: bytes per second since the report before.
    """

    stage: Stage
    bytes_done: int
    bytes_total: int | None
    seconds: float
    rate: float

    @property
    def average_rate(self) -> float:
        """Bytes per second since the stream began."""
        return self.bytes_done / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the average rate; None where it cannot be made."""
        rate = self.average_rate
        if self.bytes_total is None or not rate:
            return None
        return (self.bytes_total - self.bytes_done) / rate


class Meter:
    """Counts one stream's bytes and system calls, and reports them at a bounded rate."""

    def __init__(self, report: Callable[[Progress], object] | None = None) -> None:
        if report is not None and not callable(report):
            raise InvalidArgumentError("progress", report, "must be callable or None")
        self.stage = Stage.ACCEPT
        self.done = 0
        self.total: int | None = None
        self.calls = 0
        self._report = report
        self._began = self._last = time.monotonic()
        self._last_done = 0

    def begin(self, stage: Stage) -> None:
        """The stream begins now: what went before is waiting, not transfer."""
        self.stage = stage
        self._began = self._last = time.monotonic()

    def tick(self, *, last: bool = False) -> None:
        """Report, unless the report before was just now or nobody listens."""
        if self._report is None:
            return
        now = time.monotonic()
        since = now - self._last
        if since < REPORT_INTERVAL and not last:
            return
        rate = (self.done - self._last_done) / since if since > 0 else 0.0
        self._last, self._last_done = now, self.done
        self._report(Progress(self.stage, self.done, self.total, now - self._began, rate))
