"""Owns: a directory as an archive: what of it is in, in which order, made while it is sent.

Must not know: sockets, launches, how a header's bytes are laid out.

The walk keeps what it saw of each name in compact arrays of the core. Sending goes through the tree
once more, from directory to directory by descriptors, and compares each with what was seen.
"""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
import re
import stat
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Union

from nitro_vsock.archive import DROPPED_TOP, PREFIX, TEMPLATES, header
from nitro_vsock.core import CHANGED, SHORT, Gatherer, Gathering, Kind, Listing, Scanner, Seen, Stop
from nitro_vsock.errors import (
    InvalidArgumentError,
    SourceChangedError,
    SourceError,
    SourceReadError,
    SourceTruncatedError,
    Stage,
)
from nitro_vsock.rootfs.plan import Piece, Plan
from nitro_vsock.rootfs.prefetch import Prefetch
from nitro_vsock.transport import FilePayload

logger = logging.getLogger("nitro_vsock")

STAGE_BYTES: Final = 1 << 20
"""Memory that headers and small files are gathered in, and the size of such a piece."""

LARGE: Final = 256 << 10
"""Bytes above which a file is sent from its own descriptor."""

ALONE: Final = 4
"""Pieces that are made without a thread: a small tree needs none."""

AHEAD: Final = 32
"""Pieces that are made before they are asked for, each a stage of memory or a descriptor: enough to
go on gathering for as long as most large files take to be sent."""

Path = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]

Exclude = Union[Iterable[str], Callable[[str], object]]

Rule = Callable[[str], object]

_TYPES: Final = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}

_GONE: Final = {
    errno.ENOENT: "is gone",
    errno.ELOOP: "is a symbolic link now",
    errno.ENOTDIR: "is no directory any more",
    errno.EISDIR: "is a directory now",
    errno.ENXIO: "is a socket or device now",
    errno.EINVAL: "is no symbolic link any more",
    CHANGED: "was changed or replaced",
}
"""What an errno value says of a name that was something else when the tree was walked."""


def check_directory(path: Path) -> Path:
    """Return the path of a directory that can be opened.

    Raises:
        InvalidArgumentError: it is none.
        SourceReadError: it cannot be opened; errno says why.
    """
    os.close(_open_root(path))
    return path


def _open_root(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError("rootfs", path, f"must be a path ({error})") from None
    except NotADirectoryError:
        raise InvalidArgumentError("rootfs", os.fsdecode(path), "must be a directory") from None
    except OSError as error:
        text = f"rootfs {os.fsdecode(path)!r} cannot be opened: {error.strerror}"
        raise SourceReadError(text, errno=error.errno, stage=Stage.VALIDATE) from error


def make_exclude(exclude: Exclude) -> Rule | None:
    """Return one function of the relative path that says what to leave out; None for nothing.

    Raises:
        InvalidArgumentError: neither a function nor globs.
    """
    if callable(exclude):
        return exclude
    if isinstance(exclude, (str, bytes)) or not isinstance(exclude, Iterable):
        raise InvalidArgumentError("exclude", exclude, "must be globs in a list, or a function")
    anywhere: list[str] = []
    anchored: list[str] = []
    for glob in exclude:
        bare = glob.strip("/") if isinstance(glob, str) else ""
        if not bare:
            raise InvalidArgumentError("exclude", glob, "must be a glob, as str and not empty")
        whole = "/" in glob.rstrip("/")
        (anchored if whole else anywhere).append(fnmatch.translate(bare))
    if not anywhere and not anchored:
        return None
    # A pattern that is never matched stands in for none.
    name, path = (re.compile("|".join(some) or r"(?!)") for some in (anywhere, anchored))
    return lambda it: name.match(it.rpartition("/")[2]) or path.match(it)


class _Directory:
    """What the walk keeps of a directory.

    `special` has the members the core does not make, by index; what of them is not in their entry:
    the full name of the file that a hard link links to, or a symbolic link's target.
    """

    __slots__ = ("listing", "special")

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.special: dict[int, bytes] | None = None


@dataclass
class _Frame:
    """A directory the walk is in."""

    fd: int
    prefix: bytes
    directory: _Directory
    looks: Iterator[int]


@dataclass
class _Member:
    """A member with a name of its own; with a descriptor, a file that is sent from it."""

    fd: int
    full: bytes
    seen: Seen
    listing: Listing
    index: int


_Step = Union[Gatherer, _Member]


def _gatherer() -> Gatherer:
    return Gatherer(TEMPLATES, STAGE_BYTES)


class _Walk:
    """Looks at every name of a tree and decides what becomes of it."""

    def __init__(self, path: Path, rule: Rule | None) -> None:
        self._path = os.fsencode(path)
        self._rule = rule
        self._scanner = Scanner(LARGE)
        self._shared: dict[tuple[int, int], bytes] = {}
        self._frames: list[_Frame] = []
        self.directories: list[_Directory] = []
        self.depth = self.longest = 0
        self.sockets: list[str] = []
        self.length = header.header_length(len(PREFIX))

    def run(self, root_fd: int) -> None:
        """Walk the tree below a directory's descriptor, which stays the caller's."""
        try:
            self._enter(os.dup(root_fd), PREFIX)
            while self._frames:
                frame = self._frames[-1]
                for index in frame.looks:
                    if self._decide(frame, index):
                        break
                else:
                    os.close(self._frames.pop().fd)
        finally:
            for frame in self._frames:
                os.close(frame.fd)

    def _enter(self, fd: int, prefix: bytes) -> None:
        # The top has names to drop, and may have no others than plain files.
        look_at_all = self._rule is not None or not self._frames
        try:
            listing = self._scanner.scan(fd, len(prefix), look_at_all=look_at_all)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise self._unreadable(prefix + (error.filename or b""), error) from error
            raise
        directory = _Directory(listing)
        self._frames.append(_Frame(fd, prefix, directory, iter(listing.look)))
        self.directories.append(directory)
        self.depth = max(self.depth, len(self._frames))
        self.longest = max(self.longest, len(prefix))
        self.length += listing.length

    def _decide(self, frame: _Frame, index: int) -> bool:
        """Decide about an entry; return True where it was a directory that was entered."""
        listing = frame.directory.listing
        seen = listing.seen(index)
        full = frame.prefix + seen.name
        if self._is_left_out(full, seen):
            listing.decide(index, Kind.DROPPED)
            return False
        if seen.kind == Kind.DIRECTORY:
            self.length += header.header_length(len(full) + 1)
            try:
                fd = listing.open(frame.fd, index)
            except OSError as error:
                raise self._unreadable(full, error) from error
            self._enter(fd, full + b"/")
            return True
        link = b""
        if seen.kind == Kind.SHARED:
            link = self._shared.setdefault((seen.dev, seen.ino), full)
            if link is full:
                listing.decide(index, Kind.LARGE if seen.size > LARGE else Kind.FILE)
                link = b""
            else:
                self._keep(frame, index, link)
        elif seen.kind == Kind.OTHER:
            if stat.S_ISLNK(seen.mode):
                try:
                    link = os.readlink(seen.name, dir_fd=frame.fd)
                except OSError as error:
                    raise self._unreadable(full, error) from error
            self._keep(frame, index, link)
        self.length += header.header_length(len(full), len(link))
        if stat.S_ISREG(seen.mode) and not link:
            self.length += seen.size + header.padding(seen.size)
        return False

    def _keep(self, frame: _Frame, index: int, link: bytes) -> None:
        frame.directory.listing.decide(index, Kind.OTHER)
        special = frame.directory.special
        if special is None:
            special = frame.directory.special = {}
        special[index] = link

    def _is_left_out(self, full: bytes, seen: Seen) -> bool:
        if len(self._frames) == 1 and seen.name in DROPPED_TOP:
            return True
        relative = full[len(PREFIX) :]
        if self._rule is not None and self._rule(os.fsdecode(relative)):
            return True
        if stat.S_ISSOCK(seen.mode):
            path = self._name(full)
            logger.warning("%r is a socket, which an archive cannot hold: left out", path)
            self.sockets.append(path)
            return True
        return False

    def _name(self, full: bytes) -> str:
        return _name(self._path, full)

    def _unreadable(self, full: bytes, error: OSError) -> SourceReadError:
        path = self._name(full)
        why = _GONE[CHANGED] if error.errno == CHANGED else f"cannot be read: {error.strerror}"
        return SourceReadError(f"{path!r} {why}", errno=error.errno, stage=Stage.VALIDATE)


class TreePlan(Plan):
    """The archive of a directory. It holds the directory's descriptor until it is closed."""

    def __init__(self, path: Path, root_fd: int, walk: _Walk) -> None:
        """For `of`."""
        self._path = os.fsencode(path)
        self._mode = os.fstat(root_fd).st_mode
        self._directories = walk.directories
        self._gathering = Gathering(
            root_fd,
            [directory.listing for directory in walk.directories],
            PREFIX,
            walk.depth,
            walk.longest,
        )
        self._open: deque[int] = deque()
        self._gatherer = _gatherer()
        self._spare: deque[Gatherer] = deque()
        self._stages = 1
        self._steps = Prefetch(self._make(), ALONE, AHEAD)
        self.left_out = tuple(walk.sockets)
        self._end = header.end_of_archive(walk.length)
        self.length = walk.length + self._end

    @classmethod
    def of(cls, path: Path, rule: Rule | None = None) -> TreePlan:
        """Walk a directory.

        Args:
            path: of the directory.
            rule: takes a path relative to it, returns true for what to leave out.

        Raises:
            InvalidArgumentError: not a directory.
            SourceReadError: something in it cannot be read; the message names it, errno says why.
        """
        root_fd = _open_root(path)
        try:
            walk = _Walk(path, rule)
            walk.run(root_fd)
            return cls(path, root_fd, walk)
        except BaseException:
            os.close(root_fd)
            raise

    def close(self) -> None:
        """Close every descriptor the plan holds; any number of times."""
        self._steps.close()
        self._gathering.close()
        while self._open:
            os.close(self._open.pop())

    def pieces(self) -> Iterator[Piece]:
        """Make the archive, see `Plan.pieces`."""
        made = 0
        try:
            for step in self._steps:
                if isinstance(step, Gatherer):
                    piece = step.memory[: step.used]
                    made += piece.nbytes
                    yield piece
                    step.used = 0
                    self._spare.append(step)
                else:
                    made += step.seen.size
                    yield from self._give(step)
        finally:
            self._steps.close()
        if made != self.length:
            raise AssertionError(f"{made} bytes were made of {self.length} that were planned")

    def _give(self, member: _Member) -> Iterator[Piece]:
        """Give the file that has been open for longest."""
        self.where = self._name(member.full)
        yield FilePayload(member.fd, 0, member.seen.size, member.seen.mode, seekable=True)
        self.where = ""
        try:
            member.listing.check_open(member.fd, member.index)
        except OSError as error:
            raise self._changed(member.full, error) from None
        os.close(self._open.popleft())

    def _make(self) -> Iterator[_Step]:
        """Gather, maybe on a thread, which shares `_open` and `_spare` with whoever gives."""
        root = tarfile.TarInfo(PREFIX.decode())
        root.type, root.mode = tarfile.DIRTYPE, self._mode
        self._put(header.header(root))
        while (stop := self._gather()) is not Stop.END:
            if stop is Stop.OTHER:
                yield from self._special()
            elif stop is Stop.OPENED:
                fd = self._gathering.opened
                self._open.append(fd)
                yield from self._large(self._member(fd, self._gathering.next - 1))
            elif self._gatherer.used:
                yield from self._flush()
        yield from self._zeros(self._end)
        yield from self._flush()

    def _gather(self) -> Stop:
        try:
            return self._gatherer.gather(self._gathering)
        except OSError as error:
            member = self._member(-1, self._gathering.next)
            raise self._changed(member.full, error) from None

    def _member(self, fd: int, index: int) -> _Member:
        """Return a member of the directory that is being gathered."""
        listing = self._directories[self._gathering.directory].listing
        seen = listing.seen(index)
        return _Member(fd, self._gathering.prefix + seen.name, seen, listing, index)

    def _special(self) -> Iterator[_Step]:
        """Make a member the core does not make, the next of its directory."""
        gathering = self._gathering
        special = self._directories[gathering.directory].special
        assert special is not None  # noqa: S101 - the walk has kept it
        member = self._member(-1, gathering.next)
        described = _describe(member.full, member.seen, special[member.index])
        try:
            if described.isreg():
                member.fd = member.listing.open(gathering.fd, member.index)
                self._open.append(member.fd)
            else:
                member.listing.check(gathering.fd, member.index)
        except OSError as error:
            raise self._changed(member.full, error) from None
        blocks = header.header(described)
        if self._gatherer.used + len(blocks) > STAGE_BYTES:
            yield from self._flush()
        self._put(blocks)
        gathering.skip()
        if described.isreg():
            yield from self._large(member)

    def _large(self, member: _Member) -> Iterator[_Step]:
        """Make a file whose header is in memory, and which was opened last."""
        yield from self._flush()
        yield member
        yield from self._zeros(header.padding(member.seen.size))

    def _put(self, data: bytes) -> None:
        gatherer = self._gatherer
        gatherer.memory[gatherer.used : gatherer.used + len(data)] = data
        gatherer.used += len(data)

    def _zeros(self, count: int) -> Iterator[_Step]:
        if self._gatherer.used + count > STAGE_BYTES:
            yield from self._flush()
        self._put(bytes(count))

    def _flush(self) -> Iterator[_Step]:
        yield self._gatherer
        # A thread takes each stage that it may before one again: which thread is the faster says
        # nothing about the peak of memory then.
        if self._spare and not (self._steps.on_thread and self._stages <= AHEAD):
            self._gatherer = self._spare.popleft()
        else:
            self._gatherer = _gatherer()
            self._stages += 1

    def _name(self, full: bytes) -> str:
        return _name(self._path, full)

    def _changed(self, full: bytes, error: OSError) -> SourceError:
        name, code = repr(self._name(full)), error.errno or 0
        since = "since the tree was walked for this launch"
        if code == SHORT:
            return SourceTruncatedError(f"{name} has shrunk {since}", stage=Stage.ROOTFS)
        if code in _GONE:
            return SourceChangedError(f"{name} {_GONE[code]} {since}", stage=Stage.ROOTFS)
        text = f"{name} cannot be read: {error.strerror}"
        return SourceReadError(text, errno=code, stage=Stage.ROOTFS)


def _name(root: bytes, full: bytes) -> str:
    """Return the path of a member in its directory."""
    return os.fsdecode(root.rstrip(b"/") + full[len(PREFIX) - 1 :])


def _describe(full: bytes, seen: Seen, link: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(full.decode("utf-8", "surrogateescape"))
    member.mode, member.linkname = seen.mode, link.decode("utf-8", "surrogateescape")
    member.type = _TYPES[stat.S_IFMT(seen.mode)]
    if member.isreg():
        if link:
            member.type = tarfile.LNKTYPE
        else:
            member.size = seen.size
    member.devmajor, member.devminor = os.major(seen.rdev), os.minor(seen.rdev)
    return member
