"""Owns: a tar that some tool wrote, turned into the archive the guest takes; only headers are made.

Must not know: sockets, directories.
"""

from __future__ import annotations

import logging
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Union

from nitro_vsock.archive import BLOCK, DROPPED_TOP, MODE_BITS, PREFIX, RECORD, TEMPLATES, header
from nitro_vsock.core import TarRun
from nitro_vsock.errors import (
    ArchiveError,
    InvalidArgumentError,
    SourceChangedError,
    SourceReadError,
    Stage,
)
from nitro_vsock.rootfs.plan import Piece, Plan
from nitro_vsock.transport import FilePayload

logger = logging.getLogger("nitro_vsock")

MAX_EXTENSION: Final = 1 << 20
"""Bytes of the headers that may stand before a member's own, and of a sparse file's map."""

_BLOCK: Final = BLOCK

_END: Final = bytes(_BLOCK)

_ROOT: Final = PREFIX[:-1]

_MAX_LENGTH: Final = (1 << 63) - 1

_MAX_DEVICE: Final = (1 << 32) - 1

_SIZE_DIGITS: Final = 20

_SHOWN: Final = 200

_MAX_PATH: Final = 4095
"""Bytes of a path that Linux takes, less its NUL."""

_MAX_REMEMBERED: Final = 64 << 20

_PER_NAME: Final = 100
"""Bytes of all names that are remembered, and what each costs beside its own."""

_WINDOW: Final = 16 << 10
"""Bytes read at a header: some small members at once, and little in vain before a large one."""

_SENT_WINDOW: Final = 128 << 10
"""The same where what is read is sent."""

_GATHER: Final = 1 << 20
"""Bytes of headers and small members that are sent together."""

_DIRECT: Final = 128 << 10
"""From so many unchanged bytes on, a run of the file's descriptor beats copying them."""

_ZEROS: Final = bytes(_GATHER)

_HARD_LINK: Final = tarfile.LNKTYPE

_SYMLINK: Final = tarfile.SYMTYPE

_DIRECTORY: Final = tarfile.DIRTYPE

_REGULAR: Final = tarfile.REGTYPE

_SPARSE: Final = tarfile.GNUTYPE_SPARSE

_DEVICES: Final = frozenset((tarfile.CHRTYPE, tarfile.BLKTYPE))

_REGULAR_KINDS: Final = frozenset((tarfile.AREGTYPE, tarfile.REGTYPE, tarfile.CONTTYPE))

_WITHOUT_DATA: Final = frozenset((_HARD_LINK, _SYMLINK, _DIRECTORY, tarfile.FIFOTYPE, *_DEVICES))

_LONG_NAME: Final = tarfile.GNUTYPE_LONGNAME

_LONG_LINK: Final = tarfile.GNUTYPE_LONGLINK

_GLOBAL: Final = tarfile.XGLTYPE

_LABEL: Final = b"V"

_OF_NEXT: Final = frozenset((_LONG_NAME, _LONG_LINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE))

_EXTENSIONS: Final = frozenset((*_OF_NEXT, _GLOBAL, _LABEL))

_REFUSED: Final = {
    b"M": "is the rest of a file that begins in another volume",
    b"D": "is a directory of an incremental backup",
    b"N": "is a long name in a form that was given up in 1990",
    b"A": "is an access control list of Solaris",
}

_SPARSE_KEYS: Final = b"GNU.sparse."

_OTHER_SPARSE_KEYS: Final = (b"SCHILY.realsize", b"SUN.holesdata")

_XATTR_KEYS: Final = (b"SCHILY.xattr.", b"LIBARCHIVE.xattr.")

_POSIX_MAGIC: Final = b"ustar\0"

_GNU_MAGIC: Final = b"ustar "

_FIELDS: Final = struct.Struct("100s8s16x12s12x8sc100s6s82x155s12x")
"""Of a header block: name, mode, size, checksum, type, link, magic, prefix."""

_DEVICE_FIELDS: Final = (slice(329, 337), slice(337, 345))

_HEAD: Final = struct.Struct("100s8s16s12s12s")
"""Of a header block, up to the checksum: name, mode, owner, size, modification time."""

_ROOM: Final = 100
"""Bytes of a name or link target that fit into a header block."""

_BLANK_SUM: Final = 8 * 32
"""Of the checksum's own field, which counts as spaces."""

_OCTAL_SIZE: Final = 8**11

_LONG: Final = b"././@LongLink"

_OWNER: Final = b"0000000\0" * 2

_TIME: Final = b"00000000000\0"

_TRAILER: Final = header.header(tarfile.TarInfo("x"))[257:]

_OLD_MAP: Final = slice(386, 482)

_OLD_MORE: Final = 482

_OLD_REAL: Final = slice(483, 495)

_OLD_STILL_MORE: Final = 504

_Edit = tuple[int, int, Union[bytes, memoryview], int]
"""begin, end, new, zeros: `new` and so many zero bytes stand for the file's bytes [begin, end).

A memoryview is good until the next edit is asked for."""


class _MalformedError(Exception):
    """Why a member cannot be taken; whoever knows which one it is says so."""


@dataclass
class _Extra:
    """What the headers before a member's own say about it."""

    length: int = 0
    said: dict[bytes, bytes] = field(default_factory=dict)
    sparse: dict[bytes, bytes] = field(default_factory=dict)
    pairs: list[bytes] = field(default_factory=list)
    has_xattrs: bool = False

    @property
    def is_sparse(self) -> bool:
        """Whether the next member has holes."""
        return bool(self.sparse or self.pairs)

    def say(self, key: bytes, value: bytes) -> None:
        """Note a path, linkpath or size. Readers differ in which of two headers counts."""
        if b"\0" in value:
            raise _MalformedError(f"has a {key.decode()} with a NUL inside")
        if self.said.setdefault(key, value) != value:
            raise _MalformedError(f"has two headers with different values of {key.decode()}")


@dataclass(frozen=True)
class _Sparse:
    """A member with holes.

    Attributes:
        data: where what is stored begins.
        stored: bytes that are stored.
        size: bytes of the file with its holes.
        runs: what is stored, in order: offset in the file with its holes, and length.
    """

    data: int
    stored: int
    size: int
    runs: list[tuple[int, int]]

    def check(self) -> None:
        """Refuse runs that do not fit the file or each other."""
        end = stored = 0
        for offset, length in self.runs:
            # Readers differ in whether a part of a block in the middle is padded.
            if offset < end or (length and stored % _BLOCK):
                raise _MalformedError("has a sparse map that is out of order")
            end = offset + length
            stored += length
        if end > self.size or stored != self.stored or self.size > _MAX_LENGTH:
            raise _MalformedError("has a sparse map that does not fit its size")

    def expand(self, begin: int, end: int, first: bytes) -> Iterator[_Edit]:
        """Say how to make it a plain one; [begin, end) is all of the member."""
        new, done, at = first, 0, self.data
        for offset, length in self.runs:
            if length:
                yield begin, at, new, offset - done
                begin = at = at + length
                new, done = b"", offset + length
        yield begin, end, new, self.size + header.padding(self.size) - done


@dataclass(frozen=True)
class _Found:
    """What a look through the headers was for, and the state of the file it holds for."""

    state: tuple[int, ...]
    members_length: int
    is_rooted: bool


class Planner:
    """Plans archives of one file, which is looked through again only after it has changed."""

    def __init__(self, prefix: str | bytes) -> None:
        """Check the prefix.

        Args:
            prefix: put in front of every name: `rootfs/`, or a directory below it.

        Raises:
            InvalidArgumentError: it is something else.
        """
        self._prefix = _checked_prefix(prefix)
        self._found: _Found | None = None

    def plan(self, payload: FilePayload, name: str) -> Plan:
        """Look through the headers of an archive.

        Args:
            payload: all of a regular file; its descriptor must stay open as long as the plan.
            name: of the file, for messages.

        Raises:
            ArchiveError: it is no tar, or the guest could not or must not unpack it.
            SourceReadError: it cannot be read.
        """
        state = _state(payload.fd, name, Stage.VALIDATE)
        if self._found is None or self._found.state != state:
            self._found = self._look_through(payload, name, state)
        return TarPlan(payload, name, self._prefix, self._found)

    def _look_through(self, payload: FilePayload, name: str, state: tuple[int, ...]) -> _Found:
        walk = _Walk(payload, name, self._prefix)
        length = walk.measure()
        is_rooted = self._prefix == PREFIX and walk.is_inside and not walk.is_outside
        if is_rooted:
            logger.info("%s: everything lies under rootfs/ already and stays there", name)
            walk = _Walk(payload, name, self._prefix, is_rooted=True)
            length = walk.measure()
        if walk.targets:
            again = _Walk(payload, name, self._prefix, is_rooted=is_rooted, wanted=walk.targets)
            again.find_wanted()
        if walk.xattrs:
            logger.warning(
                "%s: extended attributes are left out, the guest would not set them: %s%s",
                name,
                _show(walk.first_xattr),
                f" and {walk.xattrs - 1} more" if walk.xattrs > 1 else "",
            )
        if walk.dropped:
            logger.info("%s: left out %d members that the guest makes", name, walk.dropped)
        return _Found(state, length, is_rooted)


class TarPlan(Plan):
    """An archive made of another: new headers, and the file's own bytes between them."""

    def __init__(self, payload: FilePayload, name: str, prefix: bytes, found: _Found) -> None:
        """Take what a `Planner` found; the descriptor stays its owner's."""
        self._end = header.end_of_archive(found.members_length)
        self.length = found.members_length + self._end
        self._payload = payload
        self._name = name
        self._prefix = prefix
        self._found = found

    def pieces(self) -> Iterator[Piece]:
        """Make the archive, piece by piece; see `Plan.pieces`. Never more than `length` bytes.

        Raises:
            SourceChangedError: the file was written to since it was looked through.
            SourceReadError: it cannot be read.
        """
        self._require_unchanged()
        made = 0
        try:
            for piece in self._members():
                made += piece.nbytes if isinstance(piece, memoryview) else piece.length
                if made > self._found.members_length:
                    raise self._changed()
                yield piece
        except ArchiveError as error:
            raise self._changed() from error
        if made != self._found.members_length:
            raise self._changed()
        yield memoryview(_ZEROS)[: self._end]
        self._require_unchanged()

    def close(self) -> None:
        """Do nothing: the descriptor is its owner's."""

    def _require_unchanged(self) -> None:
        if _state(self._payload.fd, self._name, Stage.ROOTFS) != self._found.state:
            raise self._changed()

    def _changed(self) -> SourceChangedError:
        return SourceChangedError(
            f"{self._name} was written to while it was sent", stage=Stage.ROOTFS
        )

    def _members(self) -> Iterator[Piece]:
        payload = self._payload
        walk = _Walk(
            payload, self._name, self._prefix, is_rooted=self._found.is_rooted, is_sending=True
        )
        memory = memoryview(bytearray(_GATHER))
        used = 0
        # What comes after the memory in use: the file's bytes [first, last), with patches.
        first = last = 0
        patches: list[tuple[int, bytes]] = []
        for begin, end, new, zeros in walk.edits():
            is_large = begin - last >= _DIRECT
            if is_large or used + begin - first + _BLOCK > _GATHER:
                used = self._read_into(memory, used, first, last, patches)
                if used:
                    yield memory[:used]
                used, first = 0, last
                if is_large:
                    yield FilePayload(payload.fd, last, begin - last, payload.mode, seekable=True)
                    first = begin
            if len(new) == end - begin == _BLOCK and not zeros and isinstance(new, bytes):
                patches.append((begin - first, new))
                last = end
                continue
            used = self._read_into(memory, used, first, begin, patches)
            first = last = end
            for part in _in_parts(new, zeros):
                if used + len(part) > _GATHER:
                    yield memory[:used]
                    used = 0
                memory[used : used + len(part)] = part
                used += len(part)
        if used:
            yield memory[:used]

    def _read_into(
        self,
        memory: memoryview,
        used: int,
        first: int,
        last: int,
        patches: list[tuple[int, bytes]],
    ) -> int:
        """Add the file's bytes [first, last) and patch them; return how much is in use then."""
        at, end = used, used + last - first
        while at < end:
            try:
                got = os.preadv(self._payload.fd, [memory[at:end]], first + at - used)
            except OSError as error:
                raise _unreadable(self._name, error, Stage.ROOTFS) from error
            if got == 0:
                raise self._changed()
            at += got
        for offset, new in patches:
            memory[used + offset : used + offset + _BLOCK] = new
        patches.clear()
        return end


class _Walk:
    """One pass over the headers of an archive.

    Keeps nothing of most members: only names of symbolic links, and targets of hard links.

    Attributes:
        targets: of hard links: the target -> offset and name of the first link to it.
        is_inside, is_outside: whether a member lies under `rootfs/`, and whether one does not.
        xattrs, first_xattr: how many members have extended attributes, and the first one's name.
        dropped: members left out.
    """

    def __init__(
        self,
        payload: FilePayload,
        source: str,
        prefix: bytes,
        *,
        is_rooted: bool = False,
        is_sending: bool = False,
        wanted: dict[bytes, tuple[int, bytes]] | None = None,
    ) -> None:
        """Prepare a pass.

        Args:
            payload: all of the file.
            source: its name, for messages.
            prefix: in front of every new name.
            is_rooted: the names begin with `rootfs/` already.
            is_sending: make the headers; else some stand for others of the same length.
            wanted: `targets` of an earlier pass, to be looked for.
        """
        self._fd = payload.fd
        self._size = payload.length
        self._source = source
        self._prefix = prefix
        self._is_whole = prefix == PREFIX
        self._is_rooted = is_rooted
        self._is_sending = is_sending
        self._stage = Stage.ROOTFS if is_sending else Stage.VALIDATE
        self._run = TarRun(
            payload.fd,
            payload.length,
            prefix,
            PREFIX if is_rooted else b"",
            TEMPLATES,
            room=_SENT_WINDOW if is_sending else _WINDOW,
        )
        self._symlinks: set[bytes] = set()
        self._remembered = 0
        self._known_parent = b""
        self._wanted = dict(wanted or {})
        for target in self._wanted:
            self._run.note(target)
        self.targets: dict[bytes, tuple[int, bytes]] = {}
        self.is_inside = False
        self.is_outside = False
        self.xattrs = 0
        self.first_xattr = b""
        self.dropped = 0

    def measure(self) -> int:
        """Walk through; return the bytes that the members will take.

        Raises:
            ArchiveError, SourceReadError: as `edits` does.
        """
        length = last = 0
        for begin, end, new, zeros in self.edits():
            length += begin - last + len(new) + zeros
            last = end
            if length > _MAX_LENGTH - RECORD:
                raise self._bad(begin, b"", "its members would take more than 2^63 bytes")
        return length

    def find_wanted(self) -> None:
        """Walk on until all that is wanted was there before the first link to it.

        Raises:
            ArchiveError, SourceReadError: as `edits` does; something is wanted and was not there.
        """
        for _ in self.edits():
            if not self._wanted:
                return
        target, (at, name) = min(self._wanted.items(), key=lambda item: item[1])
        raise self._bad(at, name, f"is a hard link to {_show(target)}, which is no file before it")

    def edits(self) -> Iterator[_Edit]:
        """Say what to replace, from the beginning to the end of the file.

        Raises:
            ArchiveError: it is no tar, or the guest could not or must not unpack it.
            SourceReadError: it cannot be read.
        """
        begin = at = members = 0
        name = b""
        extra: _Extra | None = None
        while True:
            if begin == at:
                for edit in self._ordinary(at):
                    members += 1
                    name = self._run.last
                    yield edit
                begin = at = self._run.at
            block = self._block(at, name)
            if not block:
                break
            try:
                kind, raw, size, mode, link = _parse(block)
            except (tarfile.HeaderError, _MalformedError) as error:
                where = f"after member {_show(name)}" if at else "at its beginning"
                raise self._bad(at, b"", f"has no tar header {where} ({error})") from None
            name = raw
            data = at + _BLOCK
            try:
                if kind in _EXTENSIONS:
                    end = self._end(data, size)
                    extra = self._extend(extra, kind, data, size)
                    at = end
                    continue
                if extra is not None:
                    name, link, size = self._override(extra, name, link, size)
                kind, size = _settle(kind, name, size)
                sparse = None
                if kind == _SPARSE or (extra is not None and extra.is_sparse):
                    sparse = self._sparse(kind, block, data, size, extra)
                    data, size = sparse.data, sparse.stored
                place = self._place(kind, name, link, at)
                end = self._end(data, size) if size else data
                if place is None:
                    self.dropped += 1
                    yield begin, end, b"", 0
                else:
                    members += 1
                    if sparse is not None:
                        new = _header(_REGULAR, *place, sparse.size, mode)
                        yield from sparse.expand(begin, end, new)
                    elif kind in _DEVICES:
                        yield begin, data, _header(kind, *place, 0, mode, _device(block)), 0
                    elif self._is_sending:
                        yield begin, data, _header(kind, *place, size, mode), 0
                    else:
                        length = _BLOCK
                        if len(place[0]) > _ROOM or len(place[1]) > _ROOM:
                            length = header.header_length(len(place[0]), len(place[1]))
                        yield begin, data, b"", length
            except _MalformedError as error:
                raise self._bad(at, name, str(error)) from None
            begin = at = end
            extra = None
        if extra is not None:
            raise self._bad(at, name, "ends the archive, but announces another member")
        if not members:
            raise self._bad(at, b"", "has no member that the guest would unpack")
        yield begin, self._size, b"", 0

    def _ordinary(self, at: int) -> Iterator[_Edit]:
        """Run over members that have nothing unusual; the core does that, many at once."""
        run = self._run
        try:
            if self._is_sending:
                while (made := run.rename(at)) is not None:
                    yield at, at + len(made), made, 0
                    at = run.at
            else:
                while run.measure(at):
                    yield at, run.at, b"", run.at - at
                    at = run.at
        except OSError as error:
            raise _unreadable(self._source, error, self._stage) from error

    def _block(self, at: int, name: bytes) -> bytes:
        """Return the header block there; nothing at the end of the archive."""
        block = self._read(at, _BLOCK)
        if len(block) < _BLOCK:
            # Without its two blocks of zeros an archive is taken, as every reader does.
            if any(block):
                where = f"after member {_show(name)}" if at else "at its beginning"
                raise self._bad(at, b"", f"ends in the middle of a header {where}")
            return b""
        return b"" if block == _END else block

    def _read(self, at: int, size: int) -> bytes:
        size = min(size, max(self._size - at, 0))
        held = self._run.read(at, size)
        if held is not None:
            return held
        try:
            return os.pread(self._fd, size, at)
        except OSError as error:
            raise _unreadable(self._source, error, self._stage) from error

    def _bad(self, at: int, name: bytes, reason: str) -> ArchiveError:
        what = f", member {_show(name)}" if name else ""
        error = ArchiveError(
            f"{self._source}{what}: {reason} (header at byte {at})", stage=Stage.VALIDATE
        )
        error.member, error.offset = os.fsdecode(name), at
        return error

    def _end(self, data: int, size: int) -> int:
        """Return where data with its padding ends."""
        if size < 0:
            raise _MalformedError(f"has a size of {size}")
        end = data + size + header.padding(size)
        if end > self._size:
            raise _MalformedError(
                f"of {size} bytes ends past the end of the file: the archive was cut short"
            )
        return end

    def _extend(self, extra: _Extra | None, kind: bytes, data: int, size: int) -> _Extra | None:
        """Take in a header that says something about the next member."""
        if kind == _LABEL:
            return extra
        if kind == _GLOBAL:
            for key, _ in self._records(data, size):
                if key in (b"path", b"linkpath", b"size") or key.startswith(_SPARSE_KEYS):
                    raise _MalformedError(f"sets the {os.fsdecode(key)} of every member")
            return extra
        extra = extra or _Extra()
        extra.length += size
        if extra.length > MAX_EXTENSION:
            raise _MalformedError(f"has more than {MAX_EXTENSION} bytes of headers")
        if kind in (_LONG_NAME, _LONG_LINK):
            text = self._read(data, size).rstrip(b"\0")
            extra.say(b"path" if kind == _LONG_NAME else b"linkpath", text)
            return extra
        own: dict[bytes, bytes] = {}
        for key, value in self._records(data, size):
            if key in (b"path", b"linkpath", b"size"):
                own[key] = value
            elif key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                extra.pairs.append(value)
            elif key.startswith(_SPARSE_KEYS):
                if b"\0" in value:
                    raise _MalformedError(f"has a {os.fsdecode(key)} with a NUL inside")
                extra.sparse[key[len(_SPARSE_KEYS) :]] = value
            elif key in _OTHER_SPARSE_KEYS:
                raise _MalformedError(f"is a sparse file in a form that is not supported ({key!r})")
            elif key.startswith(_XATTR_KEYS):
                extra.has_xattrs = True
        for key, value in own.items():
            if value:  # an empty one means the header's own
                extra.say(key, value)
        return extra

    def _records(self, at: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        """Split `length key=value` records (pax(1))."""
        if size > MAX_EXTENSION:
            raise _MalformedError(f"has more than {MAX_EXTENSION} bytes of headers")
        data = self._read(at, size)
        begin = 0
        while begin < len(data):
            digits, space, _ = data[begin : begin + _SIZE_DIGITS + 1].partition(b" ")
            size = int(digits) if space and digits.isdigit() else 0
            key, equals, value = data[begin + len(digits) + 1 : begin + size - 1].partition(b"=")
            end = begin + size
            fits = len(digits) < size and end <= len(data) and data[end - 1 : end] == b"\n"
            if not (fits and key and equals):
                raise _MalformedError("is a malformed PAX header")
            yield key, value
            begin = end

    def _override(
        self, extra: _Extra, name: bytes, link: bytes, size: int
    ) -> tuple[bytes, bytes, int]:
        name = extra.sparse.get(b"name") or extra.said.get(b"path", name)
        if len(name) > _MAX_PATH - len(self._prefix):
            raise _MalformedError(f"has a name of more than {_MAX_PATH} bytes with its prefix")
        if len(extra.said.get(b"linkpath", b"")) > _MAX_PATH - len(self._prefix):
            raise _MalformedError(f"has a link target of more than {_MAX_PATH} bytes")
        if b"size" in extra.said:
            size = _decimal(extra.said[b"size"])
        if extra.has_xattrs:
            self.xattrs += 1
            self.first_xattr = self.first_xattr or name
        return name, extra.said.get(b"linkpath", link), size

    def _place(self, kind: bytes, name: bytes, link: bytes, at: int) -> tuple[bytes, bytes] | None:
        """Return the new name and link target; None where the member is left out."""
        clean = _clean(name)
        if self._is_rooted:
            if not clean:
                return None  # the directory above rootfs/
            clean = _below_root(clean)
        elif not self.is_outside and clean:
            is_root = clean == _ROOT and kind == _DIRECTORY
            if is_root or clean.startswith(PREFIX):
                self.is_inside = True
            else:
                self.is_outside = True
        if not clean and kind != _DIRECTORY:
            raise _MalformedError("stands for the root itself and is no directory")
        parent = clean.rpartition(b"/")[0]
        # A link that comes between siblings has another parent, so they are looked at again.
        if not parent or parent != self._known_parent:
            if self._is_left_out(clean):
                return None
            self._refuse_through_symlink(clean, "lies behind")
            self._known_parent = parent
            if parent:
                self._run.let_pass(clean.partition(b"/")[0])
        if kind == _DIRECTORY:
            # The guest would keep the link, and set the mode of what it leads to.
            if clean in self._symlinks:
                raise _MalformedError("is a directory where a symbolic link was")
            return (self._prefix + clean + b"/" if clean else self._prefix), b""
        if self._wanted and clean in self._wanted and at < self._wanted[clean][0]:
            del self._wanted[clean]
        if kind == _SYMLINK:
            if not link:
                raise _MalformedError("is a symbolic link to nothing")
            self._remember_symlink(clean)
            return self._prefix + clean, link
        if kind == _HARD_LINK:
            return self._prefix + clean, self._prefix + self._hard_link(clean, link, at)
        return self._prefix + clean, b""

    def _is_left_out(self, clean: bytes) -> bool:
        return self._is_whole and clean.partition(b"/")[0] in DROPPED_TOP

    def _refuse_through_symlink(self, clean: bytes, how: str) -> None:
        if self._symlinks:
            slash = clean.find(b"/")
            while slash > 0:
                if clean[:slash] in self._symlinks:
                    raise _MalformedError(f"{how} the symbolic link {_show(clean[:slash])}")
                slash = clean.find(b"/", slash + 1)

    def _hard_link(self, clean: bytes, link: bytes, at: int) -> bytes:
        target = _clean(link)
        if self._is_rooted:
            target = _below_root(target)
        if not target:
            raise _MalformedError(f"is a hard link to {_show(link)}")
        if target == clean:
            raise _MalformedError("is a hard link to itself")
        if self._is_left_out(target):
            raise _MalformedError(f"is a hard link to {_show(target)}, which is left out")
        self._refuse_through_symlink(target, f"is a hard link to {_show(target)}, behind")
        if target in self._symlinks:
            self._remember_symlink(clean)
        if target not in self.targets:
            self._remember(target)
            self.targets[target] = at, clean
        return target

    def _remember_symlink(self, clean: bytes) -> None:
        self._remember(clean)
        self._symlinks.add(clean)
        self._run.note(clean)

    def _remember(self, name: bytes) -> None:
        self._remembered += len(name) + _PER_NAME
        if self._remembered > _MAX_REMEMBERED:
            raise _MalformedError("is one link too many to remember")

    def _sparse(
        self, kind: bytes, block: bytes, data: int, size: int, extra: _Extra | None
    ) -> _Sparse:
        """Return what stands behind a member with holes."""
        if kind == _SPARSE:
            sparse = self._old_sparse(block, data, size)
        elif kind != _REGULAR or extra is None:
            raise _MalformedError("has holes and is no file")
        else:
            sparse = self._pax_sparse(data, size, extra)
        sparse.check()
        return sparse

    def _old_sparse(self, block: bytes, data: int, size: int) -> _Sparse:
        if block[257:263] != _GNU_MAGIC:
            raise _MalformedError("is a sparse file in a form that is not supported (type 'S')")
        parts = [block[_OLD_MAP]]
        more = block[_OLD_MORE]
        while more:
            following = self._read(data, _BLOCK)
            if len(following) < _BLOCK or len(parts) * _BLOCK > MAX_EXTENSION:
                raise _MalformedError("has a sparse map that does not end")
            parts.append(following[:_OLD_STILL_MORE])
            more = following[_OLD_STILL_MORE]
            data += _BLOCK
        numbers = b"".join(parts)
        runs = []
        for at in range(0, len(numbers), 24):
            if not numbers[at]:
                break
            runs.append((_number(numbers[at : at + 12]), _number(numbers[at + 12 : at + 24])))
        return _Sparse(data, size, _number(block[_OLD_REAL]), runs)

    def _pax_sparse(self, data: int, size: int, extra: _Extra) -> _Sparse:
        said = extra.sparse
        version = said.get(b"major", b"0"), said.get(b"minor", b"0")
        if version == (b"1", b"0"):
            # The map leads the data: the number of runs, then offset and length of each.
            text = self._read(data, min(size, MAX_EXTENSION))
            first, _, rest = text.partition(b"\n")
            count = 2 * _decimal(first)
            numbers = rest.split(b"\n", min(count, len(rest)))
            if len(numbers) != count + 1:
                raise _MalformedError("has a sparse map that does not end")
            length = len(text) - len(numbers.pop())
            length += header.padding(length)
            return _Sparse(
                data + length, size - length, _decimal(said.get(b"realsize", b"")), _runs(numbers)
            )
        if version not in ((b"0", b"0"), (b"0", b"1")):
            raise _MalformedError(f"is a sparse file in a form that is not supported {version}")
        numbers = said[b"map"].split(b",") if said.get(b"map") else extra.pairs
        return _Sparse(data, size, _decimal(said.get(b"size", b"")), _runs(numbers))


def _parse(block: bytes) -> tuple[bytes, bytes, int, int, bytes]:
    """Return type, name, size, mode and link target of a header block, as they stand there.

    Raises:
        tarfile.HeaderError: it is none.
    """
    name, mode, size, checksum, kind, link, magic, prefix = _FIELDS.unpack(block)
    length = _plain_size(block, size, checksum)
    if length is not None:
        bits = _mode(mode)
    else:  # whatever is unusual is the standard library's business
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        length, bits = info.size, info.mode & MODE_BITS
    name = name.partition(b"\0")[0]
    # In GNU's form something else stands where others have the prefix.
    if prefix[0] and magic == _POSIX_MAGIC:
        name = prefix.partition(b"\0")[0] + b"/" + name
    return kind, name, length, bits, link.partition(b"\0")[0] if link[0] else b""


def _plain_size(block: bytes, size: bytes, checksum: bytes) -> int | None:
    """Return the size where it and the checksum are plain octal digits and the latter is right."""
    if size[11] in b"\0 " and checksum[6] in b"\0 ":
        try:
            if int(checksum[:6], 8) == _sum(block) - _sum(checksum) + _BLANK_SUM:
                return int(size[:11], 8)
        except ValueError:  # a NUL, base 256, or no number
            pass
    return None


def _sum(text: bytes) -> int:
    """Return the sum of up to 512 bytes."""
    if text.isascii():
        # Adler-32's lower half is one more, modulo 65521; and a tenth of the work.
        return (zlib.adler32(text) & 0xFFFF) - 1
    return sum(text)


@lru_cache(maxsize=1024)
def _mode(field: bytes) -> int:
    return _number(field) & MODE_BITS


def _number(field: bytes) -> int:
    try:
        return int(tarfile.nti(field))  # type: ignore[attr-defined]
    except tarfile.HeaderError:
        raise _MalformedError(f"has the number {field!r} in its header") from None


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > _SIZE_DIGITS:
        raise _MalformedError(f"has the size {_show(digits)} in a PAX header or sparse map")
    return int(digits)


def _runs(numbers: list[bytes]) -> list[tuple[int, int]]:
    if len(numbers) % 2:
        raise _MalformedError("has a sparse map of an odd length")
    values = [_decimal(number) for number in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


def _settle(kind: bytes, name: bytes, size: int) -> tuple[bytes, int]:
    """Return what a member is, and the bytes of its data in the archive."""
    if kind in _REGULAR_KINDS:
        if not name.endswith(b"/"):
            return _REGULAR, size
        if size:
            raise _MalformedError(f"is a directory of {size} bytes")
        return _DIRECTORY, 0
    if kind in _WITHOUT_DATA:
        return kind, 0
    if kind != _SPARSE:
        raise _MalformedError(_REFUSED.get(kind, f"is of the unknown type {kind!r}"))
    return kind, size


def _device(block: bytes) -> tuple[int, int]:
    major, minor = (_number(block[at]) for at in _DEVICE_FIELDS)
    if not (0 <= major <= _MAX_DEVICE and 0 <= minor <= _MAX_DEVICE):
        raise _MalformedError(f"is the device {major}, {minor}")
    return major, minor


def _clean(name: bytes) -> bytes:
    """Return a name without a slash at either end, and without empty parts and dots."""
    if name.startswith(b"./"):
        name = name[2:]
    if name and name[0] not in b"/." and b"//" not in name and b"/." not in name:
        return name[:-1] if name.endswith(b"/") else name
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise _MalformedError(f"has '..' in {_show(name)}")
    return b"/".join(parts)


def _below_root(clean: bytes) -> bytes:
    if clean == _ROOT:
        return b""
    if not clean.startswith(PREFIX):
        raise _MalformedError(f"has {_show(clean)}, which is not under rootfs/, for its target")
    return clean[len(PREFIX) :]


def _header(
    kind: bytes,
    name: bytes,
    link: bytes,
    size: int,
    mode: int,
    device: tuple[int, int] | None = None,
) -> bytes:
    """Return what `ustar.header` returns, faster where nothing is unusual."""
    if device is None and size < _OCTAL_SIZE:
        new = b""
        if len(link) > _ROOM:
            new += _long(_LONG_LINK, link)
        if len(name) > _ROOM:
            new += _long(_LONG_NAME, name)
        block = _block(kind, name, link[:_ROOM], size, mode)
        return new + block if new else block
    info = tarfile.TarInfo(_text(name))
    info.type, info.linkname, info.size, info.mode = kind, _text(link), size, mode
    info.devmajor, info.devminor = device or (0, 0)
    return header.header(info)


def _block(kind: bytes, name: bytes, link: bytes, size: int, mode: int) -> bytes:
    """Return a header block; of the name it takes what fits."""
    head = _HEAD.pack(name, b"%07o\0" % mode, _OWNER, b"%011o\0" % size, _TIME)
    tail, its_sum = _tail(kind, link)
    return b"%b%06o\0 %b" % (head, _sum(head) + its_sum, tail)


def _long(kind: bytes, text: bytes) -> bytes:
    """Return the header and data that carry a long name or link target."""
    size = len(text) + 1
    return _block(kind, _LONG, b"", size, 0) + text + bytes(1 + header.padding(size))


@lru_cache(maxsize=64)
def _tail(kind: bytes, link: bytes) -> tuple[bytes, int]:
    """Return what follows the checksum, and its sum with that of the checksum's blank field."""
    tail = kind + link.ljust(_ROOM, b"\0") + _TRAILER
    return tail, _sum(tail) + _BLANK_SUM


def _in_parts(new: bytes | memoryview, zeros: int) -> Iterator[memoryview]:
    """Yield `new` and so many zero bytes in parts that fit into the memory for gathering."""
    view = memoryview(new)
    for at in range(0, len(new), _GATHER):
        yield view[at : at + _GATHER]
    view = memoryview(_ZEROS)
    for at in range(0, zeros, _GATHER):
        yield view[: zeros - at]


def _checked_prefix(prefix: str | bytes) -> bytes:
    try:
        parts = os.fsencode(prefix).rstrip(b"/").split(b"/")
    except (TypeError, ValueError):
        parts = []
    path = b"/".join(parts) + b"/"
    is_below = parts[:1] == [_ROOT] and len(path) <= _MAX_PATH // 2
    if not is_below or {b"", b".", b".."} & set(parts) or b"\0" in path:
        raise InvalidArgumentError("prefix", prefix, "must be rootfs/ or a directory below it")
    if len(parts) > 1 and parts[1] in DROPPED_TOP:
        raise InvalidArgumentError("prefix", prefix, "must not lead to what the guest makes itself")
    return path


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _show(name: bytes) -> str:
    shown = repr(_text(name))
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}... ({len(name)} bytes)"


def _state(fd: int, name: str, stage: Stage) -> tuple[int, ...]:
    try:
        found = os.fstat(fd)
    except OSError as error:
        raise _unreadable(name, error, stage) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _unreadable(name: str, error: OSError, stage: Stage) -> SourceReadError:
    text = f"rootfs {name} cannot be read: {error.strerror}"
    return SourceReadError(text, errno=error.errno, stage=stage)
