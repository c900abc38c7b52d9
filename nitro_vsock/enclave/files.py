"""Owns: a regular file that is read for an enclave image, and whether it has stayed as it was.

Knows nothing of: what the bytes mean.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from typing import Final

from nitro_vsock.errors import (
    ClosedError,
    EifError,
    EifReadError,
    InvalidArgumentError,
    Stage,
)
from nitro_vsock.transport import PathLike

CHUNK: Final = 512 << 10
"""Bytes read at once: they are still in the processor's cache when they are hashed."""


def fail(text: str, field: str = "", offset: int | None = None) -> EifError:
    """Return the error for a malformed image; the caller raises it."""
    error = EifError(text, stage=Stage.VALIDATE)
    error.field, error.offset = field, offset
    return error


class InputFile:
    """A regular file that is open for reading.

    Attributes:
        name: its path, for messages.
        size: its size in bytes when it was opened.
    """

    def __init__(self, field: str, path: PathLike) -> None:
        """Open the file.

        Args:
            field: what the file is, for messages, such as `kernel`.
            path: of a regular file.

        Raises:
            InvalidArgumentError: `path` is no path, or leads to something else than a file.
            EifReadError: the file cannot be opened.
        """
        self._fd = -1
        self._field = field
        try:
            self.name = os.fsdecode(path)
            # O_NONBLOCK: opening a FIFO must not wait for its writer.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            self._fd = os.open(self.name, flags)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(field, path, f"must be a path ({error})") from None
        except OSError as error:
            raise self._unreadable("opened", error) from error
        try:
            found = self._look()
            if not stat.S_ISREG(found.st_mode):
                raise InvalidArgumentError(field, self.name, "must be a regular file")
        except BaseException:
            self.close()
            raise
        self.size = found.st_size
        self._as_opened = _identity(found)

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly these bytes; the caller has checked `size` against a bound.

        Raises:
            EifError: the file ends before them.
            EifReadError: it cannot be read.
        """
        data = bytearray(size)
        done = 0
        while done < size:
            done += self._read_into(memoryview(data)[done:], offset + done)
        return bytes(data)

    def chunks(self, offset: int, size: int, scrap: Iterator[memoryview]) -> Iterator[memoryview]:
        """Give exactly these bytes, in chunks.

        Args:
            offset: of the first byte.
            size: number of bytes.
            scrap: gives the memory for each chunk; a chunk is good until its memory comes again.

        Raises:
            EifError: the file ends before them.
            EifReadError: it cannot be read.
        """
        end = offset + size
        while offset < end:
            memory = next(scrap)
            got = self._read_into(memory[: min(len(memory), end - offset)], offset)
            yield memory[:got]
            offset += got

    def check_unchanged(self) -> None:
        """Check that nobody has written to the file since it was opened.

        Raises:
            EifError: its size, mtime or ctime is another one.
        """
        if _identity(self._look()) != self._as_opened:
            raise fail(f"{self._field} {self.name} changed while it was read", self._field)

    def close(self) -> None:
        """Close the file; any number of times."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"unclosed {self.name!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def _read_into(self, memory: memoryview, offset: int) -> int:
        try:
            got = os.preadv(self._open_fd(), [memory], offset)
        except OSError as error:
            raise self._unreadable("read", error) from error
        if got == 0:
            raise fail(f"{self._field} {self.name} became shorter", self._field, offset)
        return got

    def _look(self) -> os.stat_result:
        try:
            return os.fstat(self._open_fd())
        except OSError as error:
            raise self._unreadable("looked at", error) from error

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise ClosedError(f"{self._field} {self.name} is closed")
        return self._fd

    def _unreadable(self, done: str, error: OSError) -> EifReadError:
        text = f"{self._field} {self.name} cannot be {done}: {error.strerror}"
        failure = EifReadError(text, errno=error.errno, stage=Stage.VALIDATE)
        failure.field = self._field
        return failure


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
