"""Owns: `Rootfs`, the description of a source that any number of launches can open.

Must not know: sockets, frames, strategies.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from nitro_vsock.archive import MAGIC_BYTES
from nitro_vsock.errors import InvalidArgumentError
from nitro_vsock.rootfs.directory import Exclude, TreePlan, check_directory, make_exclude
from nitro_vsock.rootfs.foreign import Planner
from nitro_vsock.rootfs.opened import (
    OpenRootfs,
    open_fd,
    open_file,
    refuse_compressed,
    refuse_empty,
)
from nitro_vsock.transport import FilePayload, PathLike


class Rootfs:
    """The root file system's archive: a plain tar whose members lie under `rootfs/`.

    Made by one of the class methods, which look at the source at once, so that a mistake shows
    where it was made. It holds no descriptor: each launch opens the source for itself.
    """

    def __init__(self, opener: Callable[[], OpenRootfs], name: str | None = None) -> None:
        """For this module; use the class methods.

        `name` is given where opening is dear: then the first use opens it.
        """
        self._opener = opener
        self._length: int | None = None
        self.name = name or ""
        if name is None:
            source = self.open()
            self.name = source.name
            source.close()

    @property
    def length(self) -> int:
        """Bytes, as they were when the source was last opened; a directory is walked for it.

        Raises:
            InvalidArgumentError, SourceReadError: as `open` does.
        """
        if self._length is None:
            self.open().close()
        assert self._length is not None  # noqa: S101 - open has set it
        return self._length

    def open(self) -> OpenRootfs:
        """Open the source and measure it anew.

        Raises:
            InvalidArgumentError, SourceReadError: as the class methods do; of a directory, the
                message names what cannot be read.
        """
        source = self._opener()
        self._length = source.length
        return source

    @classmethod
    def from_file(cls, path: PathLike) -> Rootfs:
        """Use a file, whole, as long as it is when the launch begins to listen.

        Args:
            path: of a readable regular file.

        Raises:
            InvalidArgumentError: not a regular file, empty, or compressed.
            SourceReadError: it cannot be opened; errno says why.
        """
        return cls(lambda: open_file(path))

    @classmethod
    def from_directory(cls, path: PathLike, *, exclude: Exclude = ()) -> Rootfs:
        """Use a directory: its archive is put together while it is sent, with no temporary file.

        The archive begins with `rootfs/`; members are sorted by the bytes of their names, a
        directory's with its trailing slash. Format GNU, owner 0:0, time 0, permission bits as they
        are: the same tree gives the same bytes anywhere. Hard links to a file that came before are
        links, symbolic links are never followed, sparse files are sent as plain data. Extended
        attributes are not sent, since the guest drops them. File systems mounted inside the tree
        are part of it.

        Left out: `dev`, `proc`, `run`, `sys`, `tmp` and `krun-awsnitro` at the top, which the guest
        makes itself; sockets, with a warning.

        Each launch walks the tree when it begins to listen, and sends that. What changes later is
        found out when it comes to it, and ends the launch.

        Args:
            path: of the directory that is to be `/`; may be a symbolic link to it.
            exclude: globs (fnmatch) of what to leave out, with all that is in it: one without a
                slash is matched against the last part of a path, `*.pyc`; one with a slash against
                the whole path from the root, `usr/share/doc` or `/boot`; `*` matches slashes too.
                Or a function that takes the path relative to the root and returns true for what to
                leave out.

        Raises:
            InvalidArgumentError: not a directory, or an exclude that is none.
            SourceReadError: it cannot be opened; errno says why.
        """
        rule = make_exclude(exclude)
        name = os.fsdecode(check_directory(path))
        return cls(lambda: OpenRootfs(TreePlan.of(path, rule), name), name)

    @classmethod
    def from_tar(cls, path: PathLike, prefix: str | bytes = "rootfs/") -> Rootfs:
        """Use a plain tar that some tool wrote, for instance `docker export`; nothing is unpacked.

        Its members are put under `rootfs/`, unless all of them lie there already. Headers are made
        anew: modes are kept; owners, times and extended attributes are not, as with a directory.
        What the guest makes itself (dev, proc, run, sys, tmp, krun-awsnitro) is left out. Data is
        sent from the file itself. docs/rootfs.md says what else becomes of which member.

        Args:
            path: of a readable regular file.
            prefix: put in front of every name: `rootfs/`, or a directory below it.

        Raises:
            InvalidArgumentError: not a regular file, empty, or compressed; or another prefix.
            ArchiveError: no tar, cut short, or with a member the guest could not or must not
                unpack; it is named.
            SourceReadError: it cannot be read; errno says why.
        """
        planner = Planner(prefix)

        def opener() -> OpenRootfs:
            source = open_file(path)
            try:
                payload = source.payload
                assert isinstance(payload, FilePayload)  # noqa: S101 - of a file it is
                source.payload = planner.plan(payload, source.name)
            except BaseException:
                source.close()
                raise
            return source

        return cls(opener)

    @classmethod
    def from_fd(cls, fd: int, offset: int | None = None, length: int | None = None) -> Rootfs:
        """Use a descriptor. Its offset and flags are left as they are.

        The descriptor must stay open until the launch begins to listen, which duplicates it.

        Args:
            fd: readable: a file, memfd, block device, pipe, FIFO or character device. What is read
                from one that cannot seek is gone, as ever.
            offset: where the archive begins, in bytes; the descriptor's own offset by default. Must
                be left out where it cannot seek.
            length: bytes to send; up to the end of the file by default. Needed where the
                descriptor has no size.

        Raises:
            InvalidArgumentError: not an open readable descriptor, offset or length out of range or
                past the end of the file, empty, or compressed.
            SourceReadError: it cannot be looked at; errno says why.
        """
        return cls(lambda: open_fd(fd, offset, length))

    @classmethod
    def from_bytes(cls, data: Any) -> Rootfs:
        """Use memory: anything contiguous with the buffer protocol, an mmap included.

        It is not copied, and must not be changed before the launch is over.

        Raises:
            InvalidArgumentError: no such buffer, empty, or compressed.
        """
        try:
            view = memoryview(data).cast("B")
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(
                "rootfs", type(data).__name__, f"must be a contiguous buffer ({error})"
            ) from None
        source = OpenRootfs(view, f"{view.nbytes} bytes of memory")
        # Looked at only here: memory may be a mapping, and its file may have shrunk by the launch.
        refuse_empty(source)
        refuse_compressed(source, bytes(view[:MAGIC_BYTES]))
        return cls(lambda: source)

    def __repr__(self) -> str:
        return f"<Rootfs {self.name} {self.length} bytes>"
