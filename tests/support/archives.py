"""Owns: making archives for tests. Must not know: the package under test."""

import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Archive:
    """A real tar under rootfs/, and its digest."""

    path: Path
    data: bytes

    @property
    def sha256(self):
        """Digest in hex."""
        return hashlib.sha256(self.data).hexdigest()


def make_tar(size):
    """Return a plain GNU tar of about `size` bytes whose data has no pattern to get lost in."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        data = os.urandom(max(size - 10240, 1))
        member = tarfile.TarInfo("rootfs/data")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
