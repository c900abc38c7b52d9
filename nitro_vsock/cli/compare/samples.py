"""Owns: root file systems to demonstrate with. Must not know: how they are sent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

_LEFT_OUT: Final = frozenset({"__pycache__", "site-packages", "dist-packages", "test"})

_PROGRAM: Final = "/bin/hello"

_STATUS: Final = 42

_BLOCK: Final = tarfile.BLOCKSIZE

_MIB: Final = 1 << 20


@dataclass(frozen=True)
class Sample:
    """A root file system to launch.

    Attributes:
        what: it is, for people.
        argv: of a program in it; empty where there is none that could run.
        status: what that program is told to exit with.
        problem: why there is no program.
    """

    what: str
    argv: tuple[str, ...] = ()
    status: int = 0
    problem: str = ""


def compile_program(path: Path) -> str:
    """Compile a small static program; return why that cannot be done, or nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return "there is no C compiler"
    source = Path(__file__).with_name("hello.c")
    command = [compiler, "-static", "-O2", "-o", str(path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return "" if done.returncode == 0 else f"{compiler} -static fails: {done.stderr.strip()[-200:]}"


def pack_sample(path: Path) -> Sample:
    """Write a tar with the running Python's standard library and a program that looks at it."""
    library = Path(sysconfig.get_path("stdlib"))
    if not library.is_dir():
        raise click.UsageError(
            "this Python has no standard library folder: give --rootfs or --size"
        )
    program = path.with_name("hello")
    problem = compile_program(program)
    folder = f"/usr/lib/{library.name}"
    # GNU format: PAX, which is the default, stops the guest at a name that is not ASCII.
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(library, arcname=f"rootfs{folder}", filter=_as_root)
        if not problem:
            tar.add(program, arcname=f"rootfs{_PROGRAM}", filter=_as_root)
            program.unlink()
        count = len(tar.getmembers())
    what = f"the standard library of {library.name}, {count:,} members"
    if problem:
        return Sample(what, problem=problem)
    return Sample(what, (_PROGRAM, str(_STATUS), folder), _STATUS)


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if member.name.rpartition("/")[2] in _LEFT_OUT:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


@contextmanager
def zeros(size: int, folder: str, *, in_memory: bool) -> Iterator[Path]:
    """Give the path of a tar of about `size` bytes that takes no space: its data is a hole.

    Args:
        size: bytes.
        folder: where to make it, for a while.
        in_memory: make it a memfd, which the kernel reads several times faster. Not for a source
            that is going to be mapped: there a hole of a memfd takes real memory.
    """
    member = tarfile.TarInfo("rootfs/zeros")
    end_of_archive = 2 * _BLOCK
    member.size = max(size - _BLOCK - end_of_archive, _BLOCK) // _BLOCK * _BLOCK
    fd = (
        os.memfd_create("rootfs.tar")
        if in_memory
        else os.open(Path(folder, "zeros.tar"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    )
    with os.fdopen(fd, "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(_BLOCK + member.size + end_of_archive)
        yield Path(f"/proc/self/fd/{fd}")


def noise(path: Path, size: int) -> None:
    """Write `size` bytes that take their space, and begin like no compressed file."""
    block = b"r" + os.urandom(_MIB - 1)
    with path.open("wb") as file:
        for at in range(0, size, _MIB):
            file.write(block[: size - at])
