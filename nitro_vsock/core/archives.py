"""Owns: running over the ordinary members of a tar."""

from __future__ import annotations

import errno
import os
import time

from nitro_vsock._core import ffi, lib
from nitro_vsock.core.calls import TICK_NS


class TarRun:
    """Runs over the members of a tar that have nothing unusual; the rest is left to the caller.

    Attributes:
        at: the first header that was left.
    """

    def __init__(
        self, fd: int, size: int, prefix: bytes, skip: bytes, templates: bytes, *, room: int
    ) -> None:
        """Nothing passes before `let_pass`.

        Args:
            fd: of the archive; borrowed.
            size: of the archive.
            prefix: before every new name.
            skip: what the names must begin with, and lose; may be empty.
            templates: header blocks in the order of `enum nv_template`.
            room: bytes that are read at once.
        """
        self._tar = tar = ffi.new("struct nv_tar *")
        self._window = ffi.new("uint8_t[]", room)
        self._filter = ffi.new("uint8_t[]", lib.NV_TAR_FILTER_BITS // 8)
        self._kept = [ffi.new("char[]", text) for text in (prefix, skip)]
        self._templates = ffi.new("uint8_t[]", templates)
        self._passing = b""
        tar.fd, tar.size, tar.room = fd, size, room
        tar.window, tar.filter, tar.templates = self._window, self._filter, self._templates
        tar.prefix, tar.skip = self._kept
        tar.prefix_length, tar.skip_length = len(prefix), len(skip)
        self._memory = memoryview(ffi.buffer(self._window))
        self.at = 0

    def note(self, name: bytes) -> None:
        """Leave a name to the caller from now on, and what lies below it; and others by chance."""
        lib.nv_tar_note(self._filter, name, len(name))

    def let_pass(self, top: bytes) -> None:
        """Let names pass whose first part is this, until another is given."""
        if self._passing != top:
            self._passing = top
            self._tar.top = self._top = ffi.new("char[]", top)
            self._tar.top_length = len(top)

    def measure(self, at: int) -> bool:
        """Run over members from a header on; return whether there was one.

        Raises:
            OSError: the archive cannot be read.
        """
        self._tar.renames = 0
        return self._run(at)

    def rename(self, at: int) -> memoryview | None:
        """Do the same and return what is to stand for the file's bytes from there on, headers anew.

        It ends with the last member, or where the memory does; it is good until the next call.

        Raises:
            OSError: the archive cannot be read.
        """
        self._tar.renames = 1
        if not self._run(at):
            return None
        tar = self._tar
        return self._memory[at - tar.window_at : min(self.at - tar.window_at, tar.filled)]

    def _run(self, at: int) -> bool:
        tar = self._tar
        tar.at = at
        code = errno.EINTR
        while code and tar.at == at:
            tar.tick_ns = time.monotonic_ns() + TICK_NS
            code = -lib.nv_tar_run(tar)
            if code not in (0, errno.EINTR, lib.NV_E_TICK):
                raise OSError(code, os.strerror(code))
        self.at = int(tar.at)
        return self.at > at

    @property
    def last(self) -> bytes:
        """The name of the member that was run over last, as it stood in its header."""
        raw: bytes = ffi.unpack(self._tar.last, len(self._tar.last))
        return raw.partition(b"\0")[0]

    def read(self, at: int, size: int) -> bytes | None:
        """Return bytes of the archive that are in memory, unless not all of them are."""
        tar = self._tar
        index = at - tar.window_at
        if index >= 0 and index + size <= tar.filled:
            return bytes(self._memory[index : index + size])
        return None
