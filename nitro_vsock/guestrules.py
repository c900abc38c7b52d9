"""Owns: what the real guest needs beyond well-formed frames. Sans-IO.

That is strings it can measure and a tar it can unpack.

Must not know: where the bytes come from.
"""

from __future__ import annotations

import tarfile
from typing import Final

from nitro_vsock.errors import GuestRuleError
from nitro_vsock.frames import ExecArgv, ExecEnvp, ExecPath
from nitro_vsock.protocol import FORBIDDEN_TOP, MAX_STRING_BYTES, ROOTFS_PREFIX

_BLOCK: Final = tarfile.BLOCKSIZE
_MAX_EXTENSION: Final = 1 << 20
"""Bytes of a long name or a PAX header that are looked into."""
_PAX: Final = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG: Final = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_TEXT_KEYS: Final = frozenset({"path", "linkpath", "uname", "gname", "GNU.sparse.name"})
"""What libarchive converts to the locale's character set."""
_SIZE_DIGITS: Final = 20
_SPARSE_MORE: Final = 482
_SPARSE_STILL_MORE: Final = 504


def check_strings(path: ExecPath, argv: ExecArgv, envp: ExecEnvp) -> None:
    """Check the strings together.

    Raises:
        GuestRuleError: an empty string, one the NSM does not take, or a PATH that is not envp[0]
            while argv[0] has no slash.
    """
    named = [("exec_path", path.path)]
    named += [(f"argv[{index}]", string) for index, string in enumerate(argv.strings)]
    named += [(f"envp[{index}]", string) for index, string in enumerate(envp.strings)]
    for name, string in named:
        if not 0 < len(string) <= MAX_STRING_BYTES:
            raise GuestRuleError(f"{name} is {len(string)} bytes, must be 1 to {MAX_STRING_BYTES}")
    if b"/" not in argv.strings[0] and not envp.strings[0].startswith(b"PATH="):
        raise GuestRuleError("argv[0] has no slash, and envp[0] is not PATH=: it is not found")


class TarChecker:
    """Looks at the headers of a tar that streams past, without keeping its data."""

    def __init__(self) -> None:
        self._block = bytearray()
        self._skip = 0
        self._extension = bytearray()
        self._extension_of: tarfile.TarInfo | None = None
        self._extension_left = 0
        self._overrides: dict[str, str] = {}
        self._sparse_more = False
        self._ended = False
        self.members = 0

    def feed(self, data: memoryview) -> None:
        """Take the next bytes.

        Raises:
            GuestRuleError: not a plain tar, or a member the guest cannot unpack.
        """
        while data and not self._ended:
            # The blocks of a long sparse map come before the data.
            if self._skip and not self._sparse_more:
                step = min(self._skip, len(data))
                self._skip -= step
                data = data[step:]
                continue
            step = min(_BLOCK - len(self._block), len(data))
            self._block += data[:step]
            data = data[step:]
            if len(self._block) == _BLOCK:
                block = bytes(self._block)
                self._block.clear()
                self._take(block)

    def finish(self) -> None:
        """Say that the archive is over.

        Raises:
            GuestRuleError: it has no member, or ends inside one.
        """
        inside_header = self._extension_of is not None or self._overrides or self._sparse_more
        if self._skip or self._block or inside_header:
            raise GuestRuleError("the rootfs ends in the middle of a member")
        if not self.members:
            raise GuestRuleError("the rootfs has no member")

    def _take(self, block: bytes) -> None:
        if self._extension_of is not None:
            self._take_extension(block)
        elif self._sparse_more:
            self._sparse_more = bool(block[_SPARSE_STILL_MORE])
        else:
            self._take_header(block)

    def _take_header(self, block: bytes) -> None:
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            self._ended = True
            return
        except tarfile.HeaderError as error:
            raise GuestRuleError(
                f"the rootfs is no plain tar: {error} (after {self.members} members)"
            ) from None
        if member.size < 0:
            raise GuestRuleError(f"member {member.name!r} of {member.size} bytes")
        if member.type == tarfile.XGLTYPE:  # libarchive looks at none of it
            self._skip = _padded(member.size)
            return
        if member.type in _PAX or member.type in _LONG:
            if member.size > _MAX_EXTENSION:
                raise GuestRuleError(f"a tar header of {member.size} bytes")
            if member.size:
                self._extension_of, self._extension_left = member, member.size
            return
        overrides, self._overrides = self._overrides, {}
        name = overrides.get("GNU.sparse.name") or overrides.get("path", member.name)
        size = int(overrides.get("size", member.size))
        self._check_name(name)
        self.members += 1
        if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
            self._skip = _padded(size)
        self._sparse_more = member.type == tarfile.GNUTYPE_SPARSE and bool(block[_SPARSE_MORE])

    def _take_extension(self, block: bytes) -> None:
        member = self._extension_of
        assert member is not None  # noqa: S101 - the caller looked
        self._extension += block[: min(self._extension_left, _BLOCK)]
        self._extension_left -= min(self._extension_left, _BLOCK)
        if self._extension_left:
            return
        data, self._extension, self._extension_of = bytes(self._extension), bytearray(), None
        if member.type in _LONG:
            name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            self._overrides[_LONG[member.type]] = name
            return
        for key, value in _pax_records(data):
            if key in _TEXT_KEYS and not value.isascii():
                raise GuestRuleError(
                    f"PAX header with the non-ASCII {key} {value!r}: the guest has no locale; "
                    "write the archive in GNU format"
                )
            if key == "size" and not (value.isascii() and _is_size(value)):
                raise GuestRuleError(f"PAX header with the size {value[:80]!r}")
            self._overrides[key] = value

    def _check_name(self, name: str) -> None:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or not parts or parts[0] != ROOTFS_PREFIX or ".." in parts:
            raise GuestRuleError(f"member {name!r} is not under {ROOTFS_PREFIX}/")
        if len(parts) > 1 and parts[1] in FORBIDDEN_TOP:
            raise GuestRuleError(f"member {name!r}: the guest makes {parts[1]} itself, and stops")


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _is_size(digits: str | bytes) -> bool:
    return digits.isdigit() and len(digits) <= _SIZE_DIGITS


def _pax_records(data: bytes) -> list[tuple[str, str]]:
    """Split `length key=value` records (pax(1))."""
    records = []
    while data:
        size, _, _ = data.partition(b" ")
        if not _is_size(size) or not len(size) < int(size) <= len(data):
            raise GuestRuleError("a malformed PAX header")
        record = data[len(size) + 1 : int(size) - 1].decode("utf-8", "surrogateescape")
        data = data[int(size) :]
        key, _, value = record.partition("=")
        records.append((key, value))
    return records
