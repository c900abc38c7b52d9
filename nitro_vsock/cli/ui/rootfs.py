"""Owns: what a path given as a root file system is taken for.

Must not know: what is done with it.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click

from nitro_vsock.archive import BrokenTarError, Member, MemberReader
from nitro_vsock.errors import ArchiveError, InvalidArgumentError
from nitro_vsock.protocol import ROOTFS_PREFIX
from nitro_vsock.rootfs import OpenRootfs, Rootfs


def choose_rootfs(path: str, exclude: tuple[str, ...] = ()) -> Rootfs:
    """Return a directory's archive, the archive that a file is, or a foreign tar's.

    An archive whose first member lies under `rootfs/` is sent as it is.

    Args:
        path: of it.
        exclude: globs, see `Rootfs.from_directory`.

    Raises:
        click.UsageError: globs for something else than a directory.
        NitroVsockError: as the class methods of Rootfs do.
    """
    if Path(path).is_dir():
        return Rootfs.from_directory(path, exclude=exclude)
    if exclude:
        raise click.UsageError(f"--exclude is for directories, and {path!r} is none")
    ready = Rootfs.from_file(path)
    return ready if _is_under_rootfs(ready) else Rootfs.from_tar(path)


def choose_rootfs_to_check(path: str, exclude: tuple[str, ...] = ()) -> Rootfs:
    """Return the same; of an archive that nothing can be made of, one that fails when opened.

    So that a check tells it together with everything else. A path that is no archive at all is
    wrong usage here too.
    """
    try:
        return choose_rootfs(path, exclude)
    except (InvalidArgumentError, ArchiveError) as error:
        if isinstance(error, InvalidArgumentError) and not error.code:
            raise
        failure = error

    def opener() -> OpenRootfs:
        raise failure

    return Rootfs(opener, path)


def _is_under_rootfs(rootfs: Rootfs) -> bool:
    """Tell by the first member. What is no archive counts: the checks of a launch say why."""
    reader = MemberReader()
    with closing(rootfs.open()) as source:
        try:
            for chunk in source.chunks():
                for event in reader.feed(chunk):
                    if isinstance(event, Member):
                        parts = [part for part in event.name.split(b"/") if part != b"."]
                        return parts[0] == ROOTFS_PREFIX.encode() and b".." not in parts
        except BrokenTarError:
            pass
    return True
