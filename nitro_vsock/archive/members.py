"""Owns: a tar as libarchive in the guest reads it: bytes in, members and their data out. Sans-IO.

Must not know: where the bytes come from, what becomes of the members.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, Union

BLOCK: Final = 512

_MAX_EXTENSION: Final = 1 << 20
"""Bytes of a long name or a PAX header that libarchive takes."""

_MAX_RUNS: Final = 1 << 20
"""Runs of a sparse file; what bounds our memory. libarchive has no limit of its own."""

_INT64_MAX: Final = (1 << 63) - 1

_NUMBER: Final = re.compile(rb"[ \t]*(-?)([0-7]*)")

_NO_CHECKSUM: Final = re.compile(rb"[^ \0" + b"0-7]")

_LETTER_OR_DIGIT: Final = re.compile(rb"[0-9A-Za-z\0]")

_NULL_BLOCK: Final = bytes(BLOCK)

_GNU: Final = b"ustar  \0"

_SPARSE_MORE, _SPARSE_STILL_MORE = 482, 504

_PAX_SIZE_DIGITS: Final = 20

_LONG: Final = {b"L": b"path", b"K": b"linkpath"}

_TEXT_KEYS: Final = (b"path", b"linkpath", b"uname", b"gname")
"""What libarchive converts from UTF-8 to the locale's character set."""


class Kind(str, Enum):
    """What a member becomes in the guest."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    HARD_LINK = "hard link"
    CHARACTER = "character device"
    BLOCK = "block device"
    FIFO = "fifo"


_KINDS: Final = {
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
    b"D": Kind.DIRECTORY,
}
"""By type flag; every other flag is a file."""

_REAL_SIZE: Final = (b"GNU.sparse.realsize", b"GNU.sparse.size", b"SCHILY.realsize")

_WITHOUT_DATA: Final = frozenset(b"23456")


class Flaw(NamedTuple):
    """What is wrong with something.

    Attributes:
        code: a stable string for programs; docs/rootfs.md lists them.
        text: for people.
    """

    code: str
    text: str


class BrokenTarError(Exception):
    """The archive cannot be read on from here. Never leaves this package.

    Attributes:
        flaw: why.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.flaw = Flaw(code, text)


@dataclass
class Member:
    """A member, as its headers describe it.

    Attributes:
        name: the full name, as libarchive reports it.
        kind: what it becomes.
        mode: permission bits.
        size: bytes of the file in the guest, holes included.
        link: the target of a link, else empty.
        flaws: why libarchive gives a warning, on which the guest stops.
    """

    __slots__ = ("flaws", "kind", "link", "mode", "name", "size")

    name: bytes
    kind: Kind
    mode: int
    size: int
    link: bytes
    flaws: tuple[Flaw, ...]


class Data(NamedTuple):
    """A piece of the data of the member that came last.

    A sparse file has one run for each stretch of data, any other file has one. Holes do not come.

    Attributes:
        view: the bytes, good until more are fed.
        last: whether it is the last piece of its run.
    """

    view: memoryview
    last: bool


Event = Union[Member, Data]


class MemberReader:
    """Splits the bytes of a tar into members and data, however they are cut.

    It holds a header, or the runs of a sparse file, and no data.

    Attributes:
        ended: the end-of-archive block came; what follows it is not looked at.
        members: how many there were.
    """

    def __init__(self) -> None:
        self.ended = False
        self.members = 0
        self._block = bytearray()
        self._run = 0
        self._runs: array[int] = array("q")
        self._next_run = 0
        self._stored = 0
        self._padding = 0
        self._skip = 0
        self._take = self._take_header
        self._pax_format = False
        self._extension = bytearray()
        self._extension_left = 0
        self._extension_kind = b""
        self._pending: dict[bytes, bytes] = {}
        self._flaws: list[Flaw] = []
        self._member: Member | None = None
        self._map = b""
        self._map_left = 0

    def feed(self, data: bytes | memoryview) -> Iterator[Event]:
        """Yield the events that complete with `data`; iterate to the end before feeding more.

        Raises:
            BrokenTarError: the reader is of no use afterwards.
        """
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end and not self.ended:
            if self._run:
                step = min(self._run, end - at)
                self._run -= step
                last = not self._run
                if last:
                    self._begin_run()
                yield Data(view[at : at + step], last)
            elif self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
            else:
                step = min(BLOCK - len(self._block), end - at)
                if step == BLOCK:
                    block = bytes(view[at : at + BLOCK])
                else:
                    self._block += view[at : at + step]
                    if len(self._block) < BLOCK:
                        return
                    block = bytes(self._block)
                    self._block.clear()
                member = self._take(block)
                if member is not None:
                    self.members += 1
                    yield member
            at += step

    def finish(self) -> None:
        """Say that there are no more bytes.

        Raises:
            BrokenTarError: they end inside a member.
        """
        if self._run or self._skip or self._block or self._member or self._between():
            raise BrokenTarError(
                "truncated",
                f"the rootfs ends in the middle of a member (after {self.members} members)",
            )

    def _between(self) -> bool:
        """Whether a header of a member is there and the member is not."""
        return bool(self._extension_left or self._pending or self._flaws)

    def _begin_run(self) -> None:
        """Go on to the next run that has bytes, or to the padding."""
        runs = self._runs
        while self._stored and self._next_run < len(runs):
            self._run = min(runs[self._next_run], self._stored)
            self._next_run += 1
            if self._run:
                self._stored -= self._run
                return
        # What is stored and in no run is passed over, and so is the padding.
        self._skip = self._stored + self._padding
        self._stored = 0

    def _complete(self) -> Member:
        """Return the member whose headers are all there; its data comes next."""
        member, self._member = self._member, None
        assert member is not None  # noqa: S101 - the callers made it
        self._next_run = 0
        self._take = self._take_header
        self._begin_run()
        return member

    def _take_header(self, block: bytes) -> Member | None:
        if block == _NULL_BLOCK:
            self.ended = True
            return None
        self._check_sum(block)
        flag = block[156:157]
        if self.members == 0 and not self._between():
            self._check_first(block, flag)
        if flag in b"xXLKAg":
            self._begin_extension(block, flag)
            return None
        if flag == b"V":  # libarchive goes on to the next header, whatever its size says
            return None
        return self._begin_member(block, flag)

    def _check_sum(self, block: bytes) -> None:
        field = block[148:156]
        if not _NO_CHECKSUM.search(field):
            total = sum(block) - sum(field) + 8 * 32
            declared = _number(field)
            # Some old writers added up signed bytes.
            if declared == total or declared == total - 256 * sum(
                byte > 127 for byte in block[:148] + block[156:]
            ):
                return
        if self.members == 0:
            raise BrokenTarError(
                "not-a-tar", "the rootfs is no plain tar: the first block is no header"
            )
        raise BrokenTarError(
            "bad-header",
            f"the rootfs is no plain tar: a header has a wrong checksum "
            f"(after {self.members} members)",
        )

    def _check_first(self, block: bytes, flag: bytes) -> None:
        """Look harder at the first header, as libarchive does to tell a tar from other formats."""
        if not _LETTER_OR_DIGIT.match(flag) or block[100] not in b"\0\xff 01234567":
            raise BrokenTarError(
                "not-a-tar", "the rootfs is no plain tar: its first header is of no known form"
            )

    def _begin_extension(self, block: bytes, flag: bytes) -> None:
        size = _number(block[124:136])
        if not 0 <= size <= _MAX_EXTENSION:
            raise BrokenTarError("bad-header", f"a tar header of {size} bytes")
        if flag not in _LONG:
            self._pax_format = True
        self._extension_kind = flag
        self._extension_left = size
        self._extension.clear()
        if size:
            self._take = self._take_extension

    def _take_extension(self, block: bytes) -> None:
        self._extension += block[: self._extension_left]
        self._extension_left -= min(self._extension_left, BLOCK)
        if self._extension_left:
            return
        self._take = self._take_header
        data, kind = bytes(self._extension), self._extension_kind
        self._extension.clear()
        # The first header of a member is applied last, so it counts.
        if kind in _LONG:
            self._pending.setdefault(_LONG[kind], data.partition(b"\0")[0])
            # Marks the header as there even where the name is empty.
            self._pending.setdefault(b"", b"")
        elif kind in b"xX":
            for key, value in self._pax_values(data).items():
                self._pending.setdefault(key, value)

    def _pax_values(self, data: bytes) -> dict[bytes, bytes]:
        """Return what a PAX header says; note what libarchive cannot make use of."""
        values: dict[bytes, bytes] = {b"": b""}
        runs: list[bytes] = []
        for key, value in self._pax_records(data):
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                runs.append(value)
            values[key] = value
        if runs:
            values[b"GNU.sparse.map"] = b",".join(runs)
        if b"size" in values and not _is_size(values[b"size"]):
            size = _text(values[b"size"])[:80]
            raise BrokenTarError("bad-header", f"PAX header with the size {size!r}")
        if values.get(b"hdrcharset") != b"BINARY":
            for key in _TEXT_KEYS:
                value = values.get(key, b"")
                if key == b"path":
                    value = values.get(b"GNU.sparse.name") or value
                if not value.isascii():
                    self._flaws.append(
                        Flaw(
                            "pax-non-ascii",
                            f"PAX header with the non-ASCII {_text(key)} {_text(value)!r}: "
                            "the guest has no locale; write the archive in GNU format",
                        )
                    )
        return values

    def _pax_records(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Split `length key=value` records (pax(1))."""
        while data:
            digits, _, _ = data.partition(b" ")
            size = int(digits) if _is_size(digits) else 0
            record = data[len(digits) + 1 : size - 1] if size else b""
            key, equals, value = record.partition(b"=")
            if not len(digits) < size <= len(data) or data[size - 1] != 10 or not key or not equals:
                self._flaws.append(Flaw("bad-header", "a malformed PAX header"))
                return
            yield key, value
            data = data[size:]

    def _begin_member(self, block: bytes, flag: bytes) -> Member | None:
        gnu = block[257:265] == _GNU
        ustar = not gnu and block[257:262] == b"ustar"
        if not ustar:
            self._pax_format = False
        pending, self._pending = self._pending, {}
        flaws, self._flaws = self._flaws, []

        name = block[:100].partition(b"\0")[0]
        if ustar and block[345]:
            prefix = block[345:500].partition(b"\0")[0]
            name = prefix + (b"" if prefix.endswith(b"/") else b"/") + name
        kind = _KINDS.get(flag, Kind.FILE)
        link = block[157:257].partition(b"\0")[0]
        stored = _number(block[124:136])
        if stored < 0:
            flaws.append(Flaw("bad-header", f"member {_text(name)!r} of {stored} bytes"))
            stored = 0
        # A hard link has data in PAX archives alone; others give the size of what it links to.
        if flag[0] in _WITHOUT_DATA or (flag == b"1" and not self._pax_format):
            stored = 0
        size = stored
        if pending:  # most members have none
            name = pending.get(b"GNU.sparse.name") or pending.get(b"path") or name
            link = pending.get(b"linkpath") or link
            if b"size" in pending:
                size = stored = min(int(pending[b"size"]), _INT64_MAX)
            for key in _REAL_SIZE:
                if _is_size(pending.get(key, b"")):
                    size = min(int(pending[key]), _INT64_MAX)
        if kind is Kind.FILE and name.endswith(b"/"):
            # libarchive takes the next block for a header, whatever the size says.
            kind, size, stored = Kind.DIRECTORY, 0, 0
        self._stored, self._padding = stored, -stored % BLOCK
        if gnu and block[483]:
            size = max(_number(block[483:495]), 0)
        is_link = kind in (Kind.SYMLINK, Kind.HARD_LINK)
        self._member = Member(
            name,
            kind,
            _number(block[100:108]) & 0o7777,
            size,
            link if is_link else b"",
            tuple(flaws),
        )
        return self._begin_data(block, pending, gnu)

    def _begin_data(self, block: bytes, pending: dict[bytes, bytes], gnu: bool) -> Member | None:
        runs = self._runs = array("q")
        if gnu and block[386]:
            self._add_runs(block, 386, 4)
            if block[_SPARSE_MORE]:
                self._take = self._take_sparse
                return None
        elif not pending or not self._begin_pax_map(pending):
            runs.append(self._stored)
        elif self._take == self._take_map:
            return None
        return self._complete()

    def _begin_pax_map(self, pending: dict[bytes, bytes]) -> bool:
        """Take the map of a sparse file in a PAX archive; return whether there is one."""
        version = pending.get(b"GNU.sparse.major"), pending.get(b"GNU.sparse.minor")
        if version == (b"1", b"0"):
            self._map, self._map_left = b"", -1
            self._take = self._take_map
            return True
        if version != (None, None) or b"SUN.holesdata" in pending:
            raise self._bad_map("of an unknown form")
        if b"GNU.sparse.map" not in pending:
            return False
        numbers = pending[b"GNU.sparse.map"].split(b",")
        if len(numbers) % 2 or not all(map(_is_size, numbers)):
            raise self._bad_map("that is malformed")
        self._runs.extend(min(int(size), _INT64_MAX) for size in numbers[1::2])
        return True

    def _bad_map(self, what: str) -> BrokenTarError:
        assert self._member is not None  # noqa: S101 - a map belongs to a member
        name = _text(self._member.name)
        return BrokenTarError("bad-header", f"member {name!r} has a sparse map {what}")

    def _add_run(self, size: int) -> None:
        if not 0 <= size <= _INT64_MAX:
            raise self._bad_map("that is malformed")
        if len(self._runs) == _MAX_RUNS:
            raise self._bad_map(f"of over {_MAX_RUNS} runs")
        self._runs.append(size)

    def _add_runs(self, block: bytes, at: int, count: int) -> None:
        """Add the runs that a block of an old GNU sparse map has room for."""
        for start in range(at, at + 24 * count, 24):
            if not block[start]:
                return
            self._add_run(_number(block[start + 12 : start + 24]))

    def _take_sparse(self, block: bytes) -> Member | None:
        self._add_runs(block, 0, 21)
        return None if block[_SPARSE_STILL_MORE] else self._complete()

    def _take_map(self, block: bytes) -> Member | None:
        """Take a block of the map that leads the data of a GNU 1.0 sparse file."""
        if self._stored < BLOCK:
            raise self._bad_map("that is malformed")
        self._stored -= BLOCK
        *lines, rest = (self._map + block).split(b"\n")
        for line in lines:
            if line.startswith(b"#"):
                continue
            if not _is_size(line):
                raise self._bad_map("that is malformed")
            if self._map_left < 0:
                self._map_left = 2 * int(line)
            else:
                self._map_left -= 1
                if self._map_left % 2 == 0:
                    self._add_run(int(line))
            if self._map_left == 0:
                return self._complete()
        if len(rest) > _PAX_SIZE_DIGITS and not rest.startswith(b"#"):
            raise self._bad_map("that is malformed")
        self._map = rest[:BLOCK]
        return None


def _number(field: bytes) -> int:
    """Return a header's number: octal, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        size = 8 * len(field)
        value = int.from_bytes(field, "big")
        negative = field[0] & 0x40
        value = value - (1 << size) if negative else value & ~(0x80 << (size - 8))
        return max(min(value, _INT64_MAX), -_INT64_MAX - 1)
    match = _NUMBER.match(field)
    assert match is not None  # noqa: S101 - it matches the empty string
    value = int(match[2] or b"0", 8)
    return -value if match[1] else value


def _is_size(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) <= _PAX_SIZE_DIGITS


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
