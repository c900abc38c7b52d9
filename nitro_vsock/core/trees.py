"""Owns: looking at directories, and gathering many small files as members of an archive."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

from nitro_vsock._core import ffi, lib
from nitro_vsock.core.calls import TICK_NS, retry

CHANGED: Final = int(lib.NV_E_CHANGED)

SHORT: Final = int(lib.NV_E_SHORT)
"""`errno` of the OSError that says: not any more what was seen in a directory, or shorter."""

_SCAN_ROOM: Final = 4096

_DENTS_BYTES: Final = 1 << 16


class Kind(IntEnum):
    """What becomes of a name in a directory; see `enum nv_kind`."""

    DROPPED = lib.NV_DROPPED
    FILE = lib.NV_FILE
    LARGE = lib.NV_LARGE
    DIRECTORY = lib.NV_DIRECTORY
    SYMLINK = lib.NV_SYMLINK
    SHARED = lib.NV_SHARED
    OTHER = lib.NV_OTHER


class Stop(IntEnum):
    """Why gathering came back; see `enum nv_stop`. TICK: for the caller to look around."""

    END = lib.NV_STOP_END
    FULL = lib.NV_STOP_FULL
    OPENED = lib.NV_STOP_OPENED
    OTHER = lib.NV_STOP_OTHER
    TICK = -lib.NV_E_TICK


class Seen(NamedTuple):
    """A name in a directory and what `fstatat` said of it."""

    kind: int
    name: bytes
    mode: int
    size: int
    dev: int
    ino: int
    rdev: int


class Listing:
    """What is in a directory, sorted as in an archive.

    Attributes:
        count: entries.
        look: indices of the entries the caller must decide about.
        length: bytes of the archive the other entries make.
    """

    __slots__ = ("count", "entries", "length", "look", "names")

    def __init__(self, scan: Any) -> None:
        self.count = int(scan.count)
        self.entries = ffi.new("struct nv_entry[]", self.count)
        ffi.memmove(self.entries, scan.entries, ffi.sizeof(self.entries))
        self.names = ffi.new("char[]", scan.names_used)
        ffi.memmove(self.names, scan.names, scan.names_used)
        self.look: list[int] = ffi.unpack(scan.look, scan.looks)
        self.length = int(scan.length)

    def seen(self, index: int) -> Seen:
        """Return an entry."""
        entry = self.entries[index]
        name = ffi.unpack(self.names + entry.name, entry.name_length)
        return Seen(entry.kind, name, entry.mode, entry.size, entry.dev, entry.ino, entry.rdev)

    def decide(self, index: int, kind: Kind) -> None:
        """Say what becomes of an entry."""
        self.entries[index].kind = kind

    def open(self, dir_fd: int, index: int) -> int:
        """Open a directory or regular file that is still what was seen; the caller closes it.

        Raises:
            OSError: CHANGED, SHORT, or what the system says.
        """
        name = self.names + self.entries[index].name
        return retry(lambda: lib.nv_open_entry(dir_fd, name, self.entries + index))

    def check(self, dir_fd: int, index: int) -> None:
        """Check that a name in this directory is still what was seen.

        Raises:
            OSError: CHANGED, SHORT, or what the system says.
        """
        name = self.names + self.entries[index].name
        retry(lambda: lib.nv_unchanged(dir_fd, name, self.entries + index))

    def check_open(self, fd: int, index: int) -> None:
        """Check that an open file is still what was seen. Raises as `check` does."""
        retry(lambda: lib.nv_unchanged(fd, b"", self.entries + index))


class Scanner:
    """Looks at directories, one after the other, with memory that is used again."""

    def __init__(self, large: int) -> None:
        """`large`: bytes above which a file is of kind LARGE."""
        self._scan = ffi.new("struct nv_scan *")
        self._scan.large = large
        self._scan.open_all = os.geteuid() != 0
        self._dents = ffi.new("uint64_t[]", _DENTS_BYTES // 8)
        self._scan.dents = ffi.cast("uint8_t *", self._dents)
        self._scan.dents_room = _DENTS_BYTES
        self._give_room(_SCAN_ROOM)

    def _give_room(self, room: int) -> None:
        scan = self._scan
        entries = ffi.new("struct nv_entry[]", room)
        look = ffi.new("uint32_t[]", room)
        names = ffi.new("char[]", room * 64)
        if scan.count:
            ffi.memmove(entries, scan.entries, scan.count * ffi.sizeof("struct nv_entry"))
            ffi.memmove(names, scan.names, scan.names_used)
        scan.entries, scan.look, scan.names = self._memory = entries, look, names
        scan.room, scan.names_room = room, room * 64

    def scan(self, fd: int, prefix_length: int, *, look_at_all: bool = False) -> Listing:
        """Look at an open directory that has not been read yet.

        Args:
            fd: of the directory.
            prefix_length: bytes of a full name before the names in this directory.
            look_at_all: put every entry into `look`.

        Raises:
            OSError: `filename` is the name it is about, None for the directory itself.
        """
        scan = self._scan
        scan.fd, scan.prefix_length, scan.look_at_all = fd, prefix_length, look_at_all
        scan.count = scan.looks = scan.names_used = scan.length = 0
        scan.dents_pos = scan.dents_end = 0
        while True:
            scan.culprit = ffi.NULL
            scan.tick_ns = time.monotonic_ns() + TICK_NS
            code = -lib.nv_scan(scan)
            if code == 0:
                return Listing(scan)
            if code == lib.NV_E_ROOM:
                self._give_room(2 * scan.room)
            elif code not in (errno.EINTR, lib.NV_E_TICK):
                name = ffi.string(scan.culprit) if scan.culprit else None
                raise OSError(code, os.strerror(code), name)


class Gatherer:
    """Memory that members are gathered in.

    Attributes:
        memory: all of it.
        used: bytes from its beginning that are members.
    """

    def __init__(self, templates: bytes, size: int) -> None:
        """`templates`: header blocks in the order of `enum nv_template`."""
        self._templates = ffi.new("uint8_t[]", templates)
        self._stage = ffi.new("uint8_t[]", size)
        self.memory = memoryview(ffi.buffer(self._stage))
        self.used = 0

    def gather(self, gathering: Gathering) -> Stop:
        """Put more members of a tree into memory.

        Raises:
            OSError: about the entry `gathering.next`: CHANGED, SHORT, or what the system says.
        """
        g = gathering.state
        g.templates, g.stage, g.stage_size = self._templates, self._stage, len(self._stage)
        g.used = self.used
        g.tick_ns = time.monotonic_ns() + TICK_NS
        code = lib.nv_gather(g)
        self.used = g.used
        if code == -errno.EINTR:
            return Stop.TICK
        if code < 0 and code != Stop.TICK:
            raise OSError(-code, os.strerror(-code))
        return Stop(code)


class Gathering:
    """A tree that is being gathered, in whatever memory."""

    __slots__ = ("_kept", "state")

    def __init__(
        self, fd: int, listings: Sequence[Listing], prefix: bytes, depth: int, longest: int
    ) -> None:
        """Begin with the first directory.

        Args:
            fd: of it; ours from now on.
            listings: of all directories, in the order in which they are entered.
            prefix: what precedes the names in the first.
            depth: how many are open at once, at most.
            longest: bytes of the longest name of a directory, with prefix and slash.
        """
        dirs = ffi.new("struct nv_dir[]", len(listings))
        for directory, listing in zip(dirs, listings, strict=True):
            directory.entries, directory.names = listing.entries, listing.names
            directory.count = listing.count
        frames = ffi.new("struct nv_frame[]", depth)
        frames[0].fd, frames[0].prefix_length = fd, len(prefix)
        before = ffi.new("char[]", longest)
        ffi.memmove(before, prefix, len(prefix))
        self.state = g = ffi.new("struct nv_gather *")
        g.fd, g.dirs, g.entered, g.frames, g.depth, g.prefix = -1, dirs, 1, frames, 1, before
        self._kept = dirs, frames, before, listings

    def _top(self) -> Any:
        return self.state.frames[self.state.depth - 1]

    @property
    def fd(self) -> int:
        """The descriptor of the directory it is in."""
        return int(self._top().fd)

    @property
    def directory(self) -> int:
        """Index of the directory it is in."""
        return int(self._top().dir)

    @property
    def prefix(self) -> bytes:
        """What precedes the names in the directory it is in."""
        return bytes(ffi.buffer(self.state.prefix, self._top().prefix_length))

    @property
    def next(self) -> int:
        """Index of the entry that comes next in the directory it is in."""
        return int(self._top().next)

    def skip(self) -> None:
        """Go past the next entry: the caller has put it into memory."""
        self._top().next += 1

    @property
    def opened(self) -> int:
        """The descriptor opened for the caller by the last call."""
        return int(self.state.fd)

    def close(self) -> None:
        """Close the directories that are open; any number of times."""
        while self.state.depth:
            fd = self.fd
            self.state.depth -= 1
            os.close(fd)
