"""Owns: the process's standard streams. They are always open, and writing ends no launch.

Knows nothing of: what is written. Imports without click and rich.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, Final

_STDOUT: Final = 1

_STDERR: Final = 2


closed_at_start: Final[set[int]] = set()
"""The standard descriptors that were closed when the command started."""


def take_over() -> None:
    """Open what is closed of the standard descriptors, and replace `sys.stdout` and `sys.stderr`.

    A closed descriptor (`>&-`) becomes /dev/null: the next socket would get its number otherwise,
    and output would go there. The new streams escape what their encoding lacks and drop what
    nobody reads any more.
    """
    _open_closed()
    sys.stdout = _text(_STDOUT, sys.stdout, _Result)
    sys.stderr = _text(_STDERR, sys.stderr, _Notes)


def _open_closed() -> None:
    with suppress(OSError):  # a root without /dev/null
        while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
            closed_at_start.add(fd)
            os.set_inheritable(fd, True)
        os.close(fd)


class _Result(io.FileIO):
    """A descriptor that drops what is written when its reader is gone.

    It waits where it cannot be written to at once: another process may have made a pipe or
    terminal that both share non-blocking. Another error is raised once.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._failed = False
        self._terminal = self.isatty()  # a terminal that is gone says no

    def write(self, data: Any) -> int:
        """Write, and return how many bytes were taken or dropped."""
        while not self._failed:
            try:
                written = super().write(data)
            except OSError as error:
                # What stays in the buffer is written again when the interpreter ends.
                self._failed = True
                if self._drops(error):
                    break
                problem = f"stdout cannot be written to: {error.strerror}"
                raise OSError(error.errno, problem) from None
            if written is not None:
                return written
            select.select((), (self,), ())
        return len(data)

    def _drops(self, error: OSError) -> bool:
        # A socket gives ECONNRESET, a terminal whose window was closed EIO.
        gone = (errno.EPIPE, errno.ECONNRESET, *([errno.EIO] if self._terminal else []))
        return error.errno in gone


class _Notes(_Result):
    """The same without any error, since there is nowhere left to tell it."""

    def _drops(self, _: OSError) -> bool:
        return True


def _text(fd: int, before: Any, kind: type[_Result]) -> io.TextIOWrapper:
    raw = kind(fd)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=fd == _STDERR or raw.isatty(),
    )
