"""Owns: the tar format as this package writes it: headers, padding, the end, the names' frame.

Must not know: where members come from, who sends them.
"""

from __future__ import annotations

import tarfile
from typing import Final

from nitro_vsock.protocol import FORBIDDEN_TOP, ROOTFS_PREFIX

BLOCK: Final = tarfile.BLOCKSIZE

RECORD: Final = tarfile.RECORDSIZE
"""An archive's length is a multiple of it, as GNU tar and tarfile make it."""

PREFIX: Final = f"{ROOTFS_PREFIX}/".encode()
"""What every member's name begins with; alone it is the name of the first member."""

DROPPED_TOP: Final = frozenset(name.encode() for name in (*FORBIDDEN_TOP, "krun-awsnitro"))
"""Names right under PREFIX that are left out, as the reference leaves them out."""

MODE_BITS: Final = 0o7777
"""Bits of `st_mode` that a header holds."""

_NAME_ROOM: Final = 100


def padding(size: int) -> int:
    """Return how many zero bytes follow `size` bytes of a member's data."""
    return -size % BLOCK


def header_length(name_length: int, link_length: int = 0) -> int:
    """Return the bytes of `header` for a name and a link target of so many bytes each."""
    length = BLOCK
    for text in (name_length, link_length):
        if text > _NAME_ROOM:
            length += BLOCK + (text + 1) + padding(text + 1)
    return length


def end_of_archive(length: int) -> int:
    """Return how many zero bytes end an archive whose members take `length` bytes."""
    end = 2 * BLOCK
    return end + -(length + end) % RECORD


def header(member: tarfile.TarInfo) -> bytes:
    """Return the header blocks in GNU format, those of a long name or link target included.

    A directory's name gets its trailing slash. Text that is no UTF-8 is given with
    surrogateescape.
    """
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def template(kind: bytes) -> bytes:
    """Return a header block of this type flag to be filled in: name, mode, size, checksum.

    What the core fills in must come out as `header` would make it; the tests hold it to that.
    """
    if kind == tarfile.GNUTYPE_LONGNAME:
        # Its own name and magic differ from a member's: take tarfile's.
        return header(tarfile.TarInfo("x" * (_NAME_ROOM + 1)))[:BLOCK]
    member = tarfile.TarInfo()
    member.type = kind
    return header(member)[:BLOCK].replace(b"/", b"\0", 1)  # a directory's slash


TEMPLATES: Final = b"".join(
    map(
        template,
        (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_LONGNAME),
    )
)
"""What the core fills in, in the order of `enum nv_template`."""
