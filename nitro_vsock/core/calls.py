"""Owns: the compiled module's door: guards, ticks, EINTR retries. The only importer of the module.

Must not know: what is called.

Buffers are borrowed by `with ffi.from_buffer`: what an exception's frames still borrowed would
crash the garbage collector (CPython cannot clear a memoryview in a cycle that has an export).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Final

from nitro_vsock._core import ffi, lib
from nitro_vsock.deadline import Deadline

TICK_NS: Final = 50_000_000
"""C returns at least this often, so that signal handlers run although the signal reached another
thread, or this one between two system calls."""

FOREVER_NS: Final = (1 << 63) - 1
"""A deadline or tick that never comes."""

GUARD_VERDICTS: Final = (lib.NV_E_DEADLINE, lib.NV_E_CANCELLED, lib.NV_E_DIED)

VERDICTS: Final = frozenset({*GUARD_VERDICTS, lib.NV_E_TICK, errno.EINTR})
"""Why waiting ends although nothing failed."""


class Guard:
    """What ends a call early: the deadline, a cancel descriptor, a watched descriptor."""

    def __init__(
        self,
        deadline: Deadline,
        cancel_fd: int = -1,
        watch_fd: int = -1,
        *,
        on_tick: Callable[[], object] | None = None,
    ) -> None:
        """`on_tick` is called at every tick; what it raises ends the call."""
        self.wait = ffi.new("struct nv_wait *")
        self.wait.deadline_ns = deadline.ns
        self.wait.cancel_fd = cancel_fd
        self.wait.watch_fd = watch_fd
        # The first tick is due at once: it shows what was cancelled or dead before the first call.
        self.wait.tick_ns = 0
        self._on_tick = on_tick

    def next_tick(self) -> None:
        """Allow the next call into C another tick."""
        if self._on_tick is not None:
            self._on_tick()
        self.wait.tick_ns = time.monotonic_ns() + TICK_NS


def drive(call: Callable[[], int], guard: Guard, on_tick: Callable[[], None] | None = None) -> int:
    """Repeat a call over signals and ticks; return 0 or the positive errno value it ends with.

    Python runs signal handlers between two rounds, so Ctrl-C is raised from here.
    """
    while True:
        code = -call()
        if code == lib.NV_E_TICK:
            guard.next_tick()
            if on_tick is not None:
                on_tick()
        elif code != errno.EINTR:
            return code


def retry(call: Callable[[], int]) -> int:
    """Repeat a call over signals; return what it does. Raises OSError where that is negative."""
    while True:
        code = call()
        if code >= 0:
            return code
        if code != -errno.EINTR:
            raise OSError(-code, os.strerror(-code))
