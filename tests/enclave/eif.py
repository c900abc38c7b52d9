"""Owns: packing an enclave image (EIF, version 4) and its ramdisks, reproducibly.

Must not know: what is packed. usage: eif.py OUT KERNEL CMDLINE RAMDISK...   (prints PCR0, 1 and 2)
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

KERNEL, CMDLINE, RAMDISK, METADATA = 1, 2, 3, 5
_HEADER = struct.Struct(">4sHHQQHH32Q32QII")
"""Magic, version, flags, memory, CPUs, reserved, sections, offsets, sizes, unused, CRC."""
_SECTION = struct.Struct(">HHQ")
_MOST_SECTIONS = 32
_ABOUT = {"ImageName": "test", "ImageVersion": "1.0", "BuildMetadata": {}, "DockerInfo": {}}


class File(NamedTuple):
    """A file of a ramdisk."""

    data: bytes
    mode: int = 0o644


def cpio(files: Mapping[str, File]) -> bytes:
    """Return a ramdisk with these files, and the directories they lie in."""
    folders = sorted({str(up) for name in files for up in Path(name).parents} - {"."})
    entries = [(name, b"", 0o40755) for name in folders]
    entries += [(name, files[name].data, 0o100000 | files[name].mode) for name in sorted(files)]
    out = bytearray()
    for number, (name, data, mode) in enumerate([*entries, ("TRAILER!!!", b"", 0)], start=1):
        text = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(text), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + text
        out += bytes(-len(out) % 4)
        out += data
        out += bytes(-len(out) % 4)
    return bytes(out + bytes(-len(out) % 512))


def _register(*contents: bytes) -> str:
    """Return a register that begins with zeros and is extended once with the contents' digest."""
    digest = hashlib.sha384(b"".join(contents)).digest()
    return hashlib.sha384(bytes(48) + digest).hexdigest()


def registers(kernel: bytes, cmdline: bytes, ramdisks: Sequence[bytes]) -> dict[str, str]:
    """Return PCR0, PCR1 and PCR2 of the image that is packed of these."""
    return {
        "PCR0": _register(kernel, cmdline, *ramdisks),
        "PCR1": _register(kernel, cmdline, *ramdisks[:1]),
        "PCR2": _register(*ramdisks[1:]),
    }


def pack(kernel: bytes, cmdline: bytes, ramdisks: Sequence[bytes]) -> bytes:
    """Return the image."""
    about = json.dumps(_ABOUT, sort_keys=True).encode()
    sections = [(KERNEL, kernel), (CMDLINE, cmdline), (METADATA, about)]
    sections += [(RAMDISK, disk) for disk in ramdisks]
    offsets, body, at = [], [], _HEADER.size
    for kind, data in sections:
        offsets.append(at)
        body += [_SECTION.pack(kind, 0, len(data)), data]
        at += _SECTION.size + len(data)
    unused = (0,) * (_MOST_SECTIONS - len(sections))
    sizes = [len(data) for _, data in sections]
    fields = (b".eif", 4, 0, 1 << 30, 2, 0, len(sections), *offsets, *unused, *sizes, *unused, 0)
    crc = zlib.crc32(_HEADER.pack(*fields, 0)[:-4])
    for piece in body:
        crc = zlib.crc32(piece, crc)
    return b"".join([_HEADER.pack(*fields, crc), *body])


def main(out: str, kernel: str, cmdline: str, *ramdisks: str) -> None:
    """Pack what the command line names."""
    disks = [Path(disk).read_bytes() for disk in ramdisks]
    image = Path(kernel).read_bytes()
    Path(out).write_bytes(pack(image, cmdline.encode(), disks))
    print(json.dumps(registers(image, cmdline.encode(), disks), indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
