"""Owns: the peak of this process's resident memory. Must not know: what it is used for."""

from __future__ import annotations

import re
from pathlib import Path

_RESET_PEAK = "5"
"""For /proc/self/clear_refs: the peak becomes what is resident now (proc(5))."""


class PeakMemory:
    """Watches the peak from its making on.

    It reads VmHWM and not `ru_maxrss`, into which the kernel carries the size of the process that
    started this one.

    Attributes:
        reset: whether the kernel let us start the peak anew. Where not, `grown` is what the peak
            rose above the earlier one, which may hide growth below it.
    """

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
            self.reset = True
        except OSError:
            self.reset = False
        self._before = _high_water()

    def measure(self) -> dict[str, int | bool]:
        """Return the peak in bytes, how much of it came since, and `reset`."""
        peak = _high_water()
        return {"peak": peak, "grown": peak - self._before, "reset": self.reset}


def _high_water() -> int:
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise OSError("/proc/self/status has no VmHWM")
    return int(match[1]) * 1024
