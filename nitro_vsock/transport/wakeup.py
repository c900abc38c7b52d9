"""Owns: a descriptor that ends a wait. Must not know: who waits."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from nitro_vsock.errors import Stage, from_errno


def close_fd(fd: int) -> None:
    """Close a descriptor; -1 stands for none."""
    if fd >= 0:
        os.close(fd)


class WakeUp:
    """A descriptor that becomes readable when somebody wants a call to end.

    `set` may be called from any thread and from signal handlers.
    """

    def __init__(self) -> None:
        # Reentrant: a signal handler may call set while this thread is in close.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        try:
            self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise from_errno(error.errno or 0, Stage.BIND, detail="eventfd") from error

    def fileno(self) -> int:
        """The descriptor, -1 once closed."""
        return self._fd

    def set(self) -> None:
        """Wake whoever waits, now and later. No effect once closed."""
        with self._lock:
            # A forked child shares the descriptor, and would wake its parent.
            if self._fd >= 0 and self._pid == os.getpid():
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Take it back: whoever waits from now on is not woken."""
        with self._lock, suppress(BlockingIOError):
            if self._fd >= 0:
                os.eventfd_read(self._fd)

    def close(self) -> None:
        """Close the descriptor; any number of times."""
        with self._lock:
            fd, self._fd = self._fd, -1
            close_fd(fd)
