"""Owns: the header of an image and of its sections: numbers <-> bytes. No I/O.

Knows nothing of: files.

Source: `aws-nitro-enclaves-image-format`, versions 2 (with a checksum) to 4. All is big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from nitro_vsock.enclave.files import fail

MAGIC: Final = b".eif"

VERSION: Final = 4

VERSIONS: Final = range(2, VERSION + 1)
"""2 has the checksum, 3 the signature, 4 the metadata; the layout is one. 1 had no checksum."""

SECTIONS_MAX: Final = 32

ARM64: Final = 1
"""The only flag of the header."""

_HEADER: Final = struct.Struct(f">4sHHQQHH{SECTIONS_MAX}Q{SECTIONS_MAX}QII")

_SECTION: Final = struct.Struct(">HHQ")

HEADER_SIZE: Final = _HEADER.size

SECTION_SIZE: Final = _SECTION.size

CHECKSUM_AT: Final = HEADER_SIZE - 4
"""Offset of the checksum (CRC32, IEEE), which is of everything but itself."""


class SectionType(IntEnum):
    """What a section holds."""

    KERNEL = 1
    CMDLINE = 2
    RAMDISK = 3
    SIGNATURE = 4
    METADATA = 5

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class EifSection:
    """A section of an image.

    Attributes:
        type: what it holds.
        offset: bytes from the start of the file to its data.
        size: bytes of its data.
        flags: of its header; no flag is known.
    """

    type: SectionType
    offset: int
    size: int
    flags: int = 0


@dataclass(frozen=True)
class Header:
    """The header of an image, with as many offsets and sizes as it has sections."""

    version: int
    flags: int
    default_memory: int
    default_cpus: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    checksum: int = 0


def pack_header(header: Header) -> bytes:
    """Return the bytes of a header."""
    unused = (0,) * (SECTIONS_MAX - len(header.offsets))
    return _HEADER.pack(
        MAGIC,
        header.version,
        header.flags,
        header.default_memory,
        header.default_cpus,
        0,
        len(header.offsets),
        *header.offsets,
        *unused,
        *header.sizes,
        *unused,
        0,
        header.checksum,
    )


def unpack_header(data: bytes) -> Header:
    """Return the header that these HEADER_SIZE bytes are.

    Raises:
        EifError: they are no header of a known version, or it counts too many sections.
    """
    magic, version, flags, memory, cpus, _, count, *numbers = _HEADER.unpack(data)
    if magic != MAGIC:
        raise fail(f"it is no enclave image: it begins with {magic!r}, not {MAGIC!r}", "magic", 0)
    if version not in VERSIONS:
        text = f"it has version {version}; known are {VERSIONS[0]} to {VERSIONS[-1]}"
        raise fail(text, "version", 4)
    if count > SECTIONS_MAX:
        text = f"it counts {count} sections; an image has {SECTIONS_MAX} at most"
        raise fail(text, "num_sections", 26)
    offsets, sizes = numbers[:SECTIONS_MAX], numbers[SECTIONS_MAX : 2 * SECTIONS_MAX]
    return Header(
        version, flags, memory, cpus, tuple(offsets[:count]), tuple(sizes[:count]), numbers[-1]
    )


def pack_section(kind: SectionType, size: int) -> bytes:
    """Return the header of a section."""
    return _SECTION.pack(kind, 0, size)


def unpack_section(data: bytes, index: int, offset: int) -> EifSection:
    """Return the section whose header these SECTION_SIZE bytes are; `offset` is the header's.

    Raises:
        EifError: its type is not known.
    """
    kind, flags, size = _SECTION.unpack(data)
    try:
        return EifSection(SectionType(kind), offset + SECTION_SIZE, size, flags)
    except ValueError:
        text = f"section {index} has the type {kind}, which is not known"
        raise fail(text, f"section {index}", offset) from None
