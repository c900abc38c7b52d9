"""Owns: a launch's archive becoming a tree, as in the guest; and a tree going away.

Owner, times, setuid, setgid, the sticky bit and extended attributes are dropped; permission bits
and hard links survive. Must not know: what the tree is for.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Final

_CHUNK: Final = 1 << 20
_PERMISSIONS: Final = 0o777


class UnpackError(Exception):
    """The archive cannot be unpacked here, and the message says why."""


def unpack(fd: int, folder: str) -> list[str]:
    """Unpack a plain tar, in constant memory but for the directories' modes.

    Args:
        fd: of the archive, a file, read from its start. It stays open.
        folder: where its members' names begin; nothing is written outside.

    Returns:
        What could not be made here, a sentence each.

    Raises:
        UnpackError: no tar, or a member that leads outside.
        OSError: a member cannot be made.
    """
    base = os.path.realpath(folder)
    modes: dict[str, int] = {}
    notes: list[str] = []
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        try:
            with tarfile.open(
                fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
            ) as tar:
                # Not `for member in tar`: that keeps them all.
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]
                    _make(tar, member, base, modes, notes)
        except tarfile.TarError as error:
            raise UnpackError(str(error)) from error
    # At last, and the deepest first: a directory may forbid its owner to write.
    for path in sorted(modes, reverse=True):
        if not Path(path).is_symlink() and Path(path).is_dir():
            Path(path).chmod(modes[path])
    return notes


def _make(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    base: str,
    modes: dict[str, int],
    notes: list[str],
) -> None:
    path = _inside(base, member.name)
    mode = member.mode & _PERMISSIONS
    if path == base:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        with suppress(FileExistsError):
            Path(path).mkdir(0o700)
        if Path(path).is_symlink() or not Path(path).is_dir():
            _clear(path)
            Path(path).mkdir(0o700)
        modes[path] = mode
        return
    if member.islnk():
        source = _inside(base, member.linkname)
        if source != path:
            _clear(path)
            os.link(source, path, follow_symlinks=False)
        return
    _clear(path)
    if member.issym():
        Path(path).symlink_to(member.linkname)
    elif member.isfifo():
        os.mkfifo(path, mode)
    elif member.isdev():
        # Other users than root may not, nor may root of a user namespace.
        notes.append(f"{member.name} is a device and was left out")
    else:
        _make_file(tar, member, path, mode)


def _make_file(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, mode: int) -> None:
    data = tar.extractfile(member)
    if data is None:
        raise UnpackError(f"{member.name}: {member.type!r} is no kind of member")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with data, os.fdopen(fd, "wb", buffering=0) as file:
        shutil.copyfileobj(data, file, _CHUNK)
        if file.tell() != member.size:
            raise UnpackError(f"{member.name}: the archive ends in its data")
        os.fchmod(fd, mode)


def _inside(base: str, name: str) -> str:
    """Return where a name leads, the links on the way followed, the last part not."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or name.startswith("/"):
        raise UnpackError(f"{name!r} leads outside")
    if not parts:
        return base
    parent = os.path.realpath(os.path.join(base, *parts[:-1]))  # noqa: PTH118 - no Path made of it
    if parent != base and not parent.startswith(base + os.sep):
        raise UnpackError(f"{name!r} leads outside through a link")
    return os.path.join(parent, parts[-1])  # noqa: PTH118


def _clear(path: str) -> None:
    """Make room: the later of two members of a name counts."""
    try:
        Path(path).unlink()
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):
        Path(path).rmdir()


def remove_tree(path: str) -> None:
    """Remove a tree, also one whose directories forbid it to their owner. Gone is fine."""
    if not os.path.lexists(path):
        return
    for folder, _, _ in os.walk(path):  # from the top, so that each can be entered
        for entry in [folder, *(found.path for found in _directories(folder))]:
            with suppress(OSError):
                Path(entry).chmod(0o700)
    shutil.rmtree(path)


def _directories(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
