"""Owns: where a guest's output goes: files, descriptors, file objects, callbacks by line, logging.

Must not know: where it comes from. Nothing here blocks, but for what the caller's own objects do.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import io
import logging
import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol, Union

from nitro_vsock.errors import InvalidArgumentError, ProxyError
from nitro_vsock.session.signals import no_sigpipe
from nitro_vsock.transport import PathLike, wrap_socket

MAX_LINE: Final = 64 << 10
"""Bytes of a line that a callback gets at once; a longer one comes in pieces."""

TAIL_BYTES: Final = 16 << 10

TAIL_LINES: Final = 20
"""How much of the latest output is kept for errors."""

_PIPE_BUF: Final = select.PIPE_BUF
"""A pipe that polls writable takes so many bytes without blocking (pipe(7))."""

_PTMX: Final = os.makedev(5, 2)
"""The other end of a pseudoterminal (pts(4))."""

Target = Union[PathLike, int, Callable[[str], object], logging.Logger, Any]
"""A path, a descriptor, a callable that gets each line, a logger, or an object with `write`."""


class Output(Protocol):
    """A place for bytes."""

    def write(self, data: memoryview) -> int:
        """Take bytes without waiting; return how many. Raises ProxyError."""

    def fileno(self) -> int:
        """What to poll for POLLOUT where `write` took less than all; -1 where it never does."""

    def close(self) -> None:
        """Let go; what was taken is complete. Raises ProxyError."""


def open_output(target: Target, *, append: bool = False, level: int = logging.INFO) -> Output:
    """Return the place that a target stands for.

    Args:
        target: see `Target`.
        append: add to what is in a file, where the target is a path.
        level: of the records, where the target is a logger.

    Raises:
        InvalidArgumentError: it is none of these.
        ProxyError: it cannot be opened.
    """
    if isinstance(target, logging.Logger):
        logger = target
        return _Lines(lambda line: logger.log(level, "%s", line))
    if isinstance(target, (str, bytes, os.PathLike)):
        return _Descriptor(_open(target, append), str(os.fsdecode(target)))
    if isinstance(target, int) and not isinstance(target, bool):
        return _Descriptor(_duplicate(target), f"descriptor {target}")
    if callable(getattr(target, "write", None)):
        return _FileObject(target)
    if callable(target):
        return _Lines(target)
    raise InvalidArgumentError(
        "output",
        target,
        "must be a path, a descriptor, a callable, a logger or an object with write()",
    )


def _open(path: PathLike, append: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(path, flags | (os.O_APPEND if append else os.O_TRUNC), 0o666)
    except OSError as error:
        why = "nobody reads this FIFO" if error.errno == errno.ENXIO else error.strerror
        raise ProxyError(
            f"the output cannot be opened: {os.fsdecode(path)}: {why}", errno=error.errno
        ) from error


def _duplicate(fd: int) -> int:
    """Return a descriptor of our own for what `fd` is open on, non-blocking where that is ours.

    A pipe or terminal is opened anew: to make the given description non-blocking would do so to
    everybody who shares it.
    """
    try:
        found = os.fstat(fd)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise InvalidArgumentError("output", fd, "must be a descriptor open for writing")
        if stat.S_ISFIFO(found.st_mode) or (
            stat.S_ISCHR(found.st_mode) and found.st_rdev != _PTMX  # that would be a new terminal
        ):
            with suppress(OSError):
                flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
                return os.open(f"/proc/self/fd/{fd}", flags)
        return os.dup(fd)
    except InvalidArgumentError:
        raise
    except OSError as error:
        limit = f"must be an open descriptor ({error.strerror})"
        raise InvalidArgumentError("output", fd, limit) from None


class _Descriptor:
    """A file, pipe, socket or terminal behind a descriptor of our own."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        mode = os.fstat(fd).st_mode
        self._is_file = stat.S_ISREG(mode)
        self._most = None if self._is_file or not os.get_blocking(fd) else _PIPE_BUF
        self._socket = None
        if stat.S_ISSOCK(mode):
            self._socket = wrap_socket(fd)
            self._most = None

    def write(self, data: memoryview) -> int:
        done = 0
        try:
            while done < len(data) and self._is_ready():
                done += self._write(data[done : self._most and done + self._most])
        except BlockingIOError:
            pass
        except OSError as error:
            raise ProxyError(
                f"the output cannot be written: {self._name}: {error.strerror}", errno=error.errno
            ) from error
        return done

    def _is_ready(self) -> bool:
        """Whether a blocking pipe or terminal takes the next piece at once."""
        if self._most is None:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(0))

    def _write(self, data: memoryview) -> int:
        if self._is_file:
            return os.write(self._fd, data)
        if self._socket is None:
            with no_sigpipe():
                return os.write(self._fd, data)
        return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
        elif fd >= 0:
            try:
                os.close(fd)
            except OSError as error:  # a network file system may say so only now
                raise ProxyError(
                    f"the output cannot be written: {self._name}: {error.strerror}",
                    errno=error.errno,
                ) from error


class _FileObject:
    """Somebody's object with `write`; may block, and then holds up the session."""

    def __init__(self, file: Any) -> None:
        self._file = file
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        # Wrappers as those of tempfile and codecs are no TextIOBase.
        is_text = isinstance(file, io.TextIOBase) or hasattr(file, "encoding")
        self._decode = decoder.decode if is_text else None

    def write(self, data: memoryview) -> int:
        try:
            if self._decode is not None:
                self._file.write(self._decode(data))
            else:
                self._write_all(data)
            getattr(self._file, "flush", lambda: None)()
        except OSError as error:
            raise _refused(self._file, error) from error
        return len(data)

    def _write_all(self, data: memoryview) -> None:
        """An unbuffered file may take less than all, and None stands for nothing at all."""
        done = 0
        while done < len(data):
            wrote = self._file.write(bytes(data[done:]))
            if wrote is None and isinstance(self._file, io.RawIOBase):
                raise BlockingIOError(errno.EAGAIN, "a file object that does not block is full")
            is_part = type(wrote) is int and 0 < wrote < len(data) - done
            done = done + wrote if is_part else len(data)

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        """Leave the object to its owner, with the last character cut short shown."""
        if self._decode is not None:
            try:
                self._file.write(self._decode(b"", True))
                self._file.flush()
            except OSError as error:
                raise _refused(self._file, error) from error
            finally:
                self._decode = None


def _refused(file: object, error: OSError) -> ProxyError:
    return ProxyError(f"the output cannot be written: {file!r}: {error}", errno=error.errno)


class _Lines:
    """A callable that gets each line, without its end."""

    def __init__(self, call: Callable[[str], object]) -> None:
        self._call = call
        self._rest = b""

    def write(self, data: memoryview) -> int:
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = b""  # where the callable raises, it is not called again
        for line in lines:
            self._tell_in_pieces(line.removesuffix(b"\r"), 0)
        # One byte more may be a carriage return, which belongs to the line's end.
        self._rest = self._tell_in_pieces(rest, 1)
        return len(data)

    def _tell_in_pieces(self, line: bytes, spare: int) -> bytes:
        """Tell a line; with `spare` only what is too long for a piece, and return the rest."""
        while len(line) > MAX_LINE + spare:
            cut = MAX_LINE
            while cut > MAX_LINE - 3 and line[cut] & 0xC0 == 0x80:  # within a character of UTF-8
                cut -= 1
            self._call(text_of(line[:cut]))
            line = line[cut:]
        if not spare:
            self._call(text_of(line))
        return line

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        rest, self._rest = self._rest, b""
        if rest:
            self._tell_in_pieces(rest.removesuffix(b"\r"), 0)


def text_of(line: bytes) -> str:
    """Return a line as text: bytes that are not UTF-8 are escaped."""
    return line.decode("utf-8", "backslashreplace")


class Tail:
    """The latest output, for errors."""

    def __init__(self) -> None:
        self._kept = b""
        self._cut = False

    def add(self, data: memoryview) -> None:
        """Note what came."""
        kept = self._kept + bytes(data[-TAIL_BYTES:])
        self._cut |= len(self._kept) + len(data) > TAIL_BYTES
        self._kept = kept[-TAIL_BYTES:]

    def lines(self) -> tuple[str, ...]:
        """Return the last lines, at most TAIL_LINES; the first may lack its beginning."""
        lines = self._kept.split(b"\n")
        if not lines[-1]:
            lines.pop()
        if self._cut and len(lines) > 1:
            lines = lines[1:]
        return tuple(text_of(line.removesuffix(b"\r")) for line in lines[-TAIL_LINES:])
