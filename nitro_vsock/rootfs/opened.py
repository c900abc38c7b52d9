"""Owns: a source that is open for one launch: its bytes, its exact length, whether it stood still.

Must not know: sockets, frames, strategies.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Union

from nitro_vsock.archive import MAGIC_BYTES, compression
from nitro_vsock.errors import (
    InvalidArgumentError,
    SourceChangedError,
    SourceReadError,
    SourceTruncatedError,
    Stage,
    require_int,
)
from nitro_vsock.rootfs.plan import Piece, Plan
from nitro_vsock.transport import FD_MAX, FilePayload, PathLike

_OFF_MAX: Final = (1 << 63) - 1

_CHUNK: Final = 1 << 20

Payload = Union[FilePayload, memoryview, Plan]


@dataclass
class OpenRootfs:
    """A source that is open for one launch and must be closed after it.

    Attributes:
        payload: the bytes: a run of a descriptor, memory, or a plan that makes them.
        name: what to call it in messages.
    """

    payload: Payload
    name: str
    _fd: int = -1
    _as_opened: tuple[int, int] | None = None

    @property
    def length(self) -> int:
        """Exact number of bytes that will be sent."""
        payload = self.payload
        return payload.nbytes if isinstance(payload, memoryview) else payload.length

    @property
    def where(self) -> str:
        """What to call the piece that was given last in messages."""
        return (isinstance(self.payload, Plan) and self.payload.where) or self.name

    @property
    def left_out(self) -> tuple[str, ...]:
        """Paths of what the source has and an archive cannot hold, such as sockets."""
        return self.payload.left_out if isinstance(self.payload, Plan) else ()

    def pieces(self) -> Iterator[Piece]:
        """Give the archive piece by piece; a piece is good until the next is asked for.

        Raises:
            SourceError: as `Plan.pieces` does.
        """
        if isinstance(self.payload, Plan):
            yield from self.payload.pieces()
        else:
            yield self.payload

    def chunks(self, size: int = _CHUNK) -> Iterator[memoryview]:
        """Give the bytes of the archive in memory, for whoever reads instead of sending.

        A chunk is good until the next is asked for, and at most `size` bytes long.

        Raises:
            SourceTruncatedError: a file ended before its length.
            SourceError: as `pieces` does.
        """
        scrap = memoryview(bytearray(size))
        for piece in self.pieces():
            if isinstance(piece, memoryview):
                for at in range(0, piece.nbytes, size):
                    yield piece[at : at + size]
            else:
                yield from _read(piece, scrap, self.where)

    def read_small(self, limit: int) -> bytes | None:
        """Return the whole archive where it has at most `limit` bytes and is at hand; else None.

        At hand is a regular file, and memory that is no mapping: to touch a mapping whose file has
        shrunk would kill the process.

        Raises:
            SourceTruncatedError, SourceReadError: as sending it would.
        """
        payload = self.payload
        if isinstance(payload, Plan) or self.length > limit:
            return None
        if isinstance(payload, memoryview):
            return bytes(payload) if isinstance(payload.obj, (bytes, bytearray)) else None
        if not payload.seekable or not stat.S_ISREG(payload.mode) or _is_direct(payload.fd):
            return None
        try:
            data = os.pread(payload.fd, payload.length, payload.offset)
        except OSError as error:
            raise _unreadable(self.name, "read", error, Stage.ROOTFS) from error
        if len(data) < payload.length:
            return None  # sending it says what is wrong, and when
        return data

    def verify(self) -> None:
        """Check that the file was not written to since it was opened; call it before Finished.

        A file that only grew passes: what was declared was sent. A descriptor or memory of the
        caller's passes always: its content is the caller's business.

        Raises:
            SourceChangedError: the modification time moved and the size did not, or it shrank.
            SourceReadError: the file cannot be looked at any more.
        """
        if self._as_opened is None:
            return
        size, mtime = self._as_opened
        now = _stat(self._fd, self.name, Stage.ROOTFS)
        if now.st_size < size or (now.st_size == size and now.st_mtime_ns != mtime):
            raise SourceChangedError(
                f"{self.name} was written to while it was sent", stage=Stage.ROOTFS
            )

    def close(self) -> None:
        """Close what was opened here; any number of times."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if isinstance(self.payload, Plan):
            self.payload.close()


def _unreadable(
    name: str, done: str, error: OSError, stage: Stage = Stage.VALIDATE
) -> SourceReadError:
    text = f"rootfs {name} cannot be {done}: {error.strerror}"
    return SourceReadError(text, errno=error.errno, stage=stage)


def _stat(fd: int, name: str, stage: Stage = Stage.VALIDATE) -> os.stat_result:
    try:
        return os.fstat(fd)
    except OSError as error:
        raise _unreadable(name, "looked at", error, stage) from error


def _read(run: FilePayload, scrap: memoryview, name: str) -> Iterator[memoryview]:
    done = 0
    while done < run.length:
        part = scrap[: min(len(scrap), run.length - done)]
        try:
            got = (
                os.preadv(run.fd, [part], run.offset + done)
                if run.seekable
                else os.readv(run.fd, [part])
            )
        except OSError as error:
            raise _unreadable(name, "read", error, Stage.ROOTFS) from error
        if got == 0:
            raise SourceTruncatedError(
                f"{name} ended {run.length - done} bytes early", stage=Stage.ROOTFS
            )
        done += got
        yield part[:got]


def open_file(path: PathLike) -> OpenRootfs:
    """Open a regular file for one launch; raises as `Rootfs.from_file` does."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError("rootfs", path, f"must be a path ({error})") from None
    except OSError as error:
        raise _unreadable(repr(os.fsdecode(path)), "opened", error) from error
    name = os.fsdecode(path)
    try:
        found = _stat(fd, name)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidArgumentError(
                "rootfs", name, "must be a regular file (pipes and devices: Rootfs.from_fd)"
            )
        with suppress(OSError):  # only a hint: the kernel reads twice as far ahead
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        payload = FilePayload(fd, 0, found.st_size, found.st_mode, seekable=True)
        source = OpenRootfs(payload, name, fd, (found.st_size, found.st_mtime_ns))
        return _checked(source)
    except BaseException:
        os.close(fd)
        raise


def open_fd(fd: int, offset: int | None, length: int | None) -> OpenRootfs:
    """Duplicate a descriptor for one launch; raises as `Rootfs.from_fd` does."""
    require_int("rootfs fd", fd, 0, FD_MAX)
    if offset is not None:
        require_int("rootfs offset", offset, 0, _OFF_MAX)
    if length is not None:
        require_int("rootfs length", length, 1, _OFF_MAX - (offset or 0))
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError as error:
        limit = f"must be an open descriptor ({error.strerror})"
        raise InvalidArgumentError("rootfs fd", fd, limit) from None
    name = f"descriptor {fd}"
    try:
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except OSError as error:
        raise _unreadable(name, "duplicated", error) from error
    try:
        if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
            raise InvalidArgumentError("rootfs fd", fd, "must be open for reading")
        found = _stat(own, name)
        if stat.S_ISDIR(found.st_mode):
            raise InvalidArgumentError("rootfs fd", fd, "must not be a directory")
        return _checked(OpenRootfs(_payload(own, found, offset, length), name, own))
    except BaseException:
        os.close(own)
        raise


def _payload(fd: int, found: os.stat_result, offset: int | None, length: int | None) -> FilePayload:
    mode = found.st_mode
    try:
        position = os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        if offset is not None:
            raise InvalidArgumentError(
                "rootfs offset", offset, "must be left out for a descriptor that cannot seek"
            ) from None
        if length is None:
            raise InvalidArgumentError(
                "rootfs length", None, "must be given for a descriptor that cannot seek"
            ) from None
        return FilePayload(fd, 0, length, mode, seekable=False)
    begin = position if offset is None else offset
    if stat.S_ISREG(mode):
        size = found.st_size
        # Files of /proc and the like say 0 and can be read all the same.
        if length is None:
            length = max(size - begin, 0)
        elif size and begin + length > size:
            limit = f"must end within the file's {size} bytes (offset {begin})"
            raise InvalidArgumentError("rootfs length", length, limit)
    elif length is None:
        raise InvalidArgumentError("rootfs length", None, "must be given for a device")
    return FilePayload(fd, begin, length, mode, seekable=True)


def _checked(source: OpenRootfs) -> OpenRootfs:
    payload = source.payload
    assert isinstance(payload, FilePayload)  # noqa: S101 - the callers made it
    refuse_empty(source)
    if payload.seekable and stat.S_ISREG(payload.mode):
        refuse_compressed(source, _peek(payload, source.name))
    return source


def _peek(payload: FilePayload, name: str) -> bytes:
    if _is_direct(payload.fd):
        return b""  # would need aligned memory
    try:
        return os.pread(payload.fd, min(MAGIC_BYTES, payload.length), payload.offset)
    except OSError as error:
        raise _unreadable(name, "read", error) from error


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def refuse_empty(source: OpenRootfs) -> None:
    """Raise InvalidArgumentError where a source has no bytes."""
    if source.length == 0:
        raise InvalidArgumentError("rootfs", source.name, "must not be empty")


def refuse_compressed(source: OpenRootfs, head: bytes) -> None:
    """Raise InvalidArgumentError where `head` is the start of a compressed file."""
    found = compression(head)
    if found is not None:
        kind, command = found
        error = InvalidArgumentError(
            "rootfs", source.name, f"must be a plain tar, this is {kind}: run `{command}` first"
        )
        error.code = "compressed"
        raise error
