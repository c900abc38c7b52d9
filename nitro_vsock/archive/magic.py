"""Owns: telling what a file is by its first bytes. Sans-IO.

Must not know: where they come from.
"""

from __future__ import annotations

from typing import Final

MAGIC_BYTES: Final = 6

_COMPRESSED: Final = (
    (b"\x1f\x8b", "gzip", "gzip -d"),
    (b"BZh", "bzip2", "bzip2 -d"),
    (b"\xfd7zXZ\x00", "xz", "xz -d"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -d"),
)


def compression(head: bytes) -> tuple[str, str] | None:
    """Return what a file that begins so is compressed with, and the command that undoes it."""
    for magic, kind, command in _COMPRESSED:
        if head.startswith(magic):
            return kind, command
    return None
