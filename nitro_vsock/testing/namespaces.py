"""Owns: what surrounds a program: Linux namespaces, the file systems a guest mounts, exec.

Must not know: when what is done. Single-threaded processes only. `os.unshare` is newer than the
oldest Python supported, so that the C library is called for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000
"""linux/sched.h"""

_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_NOEXEC: Final = 8
_MS_BIND: Final = 4096
_MS_REC: Final = 16384
_MS_PRIVATE: Final = 1 << 18
_QUIET: Final = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
"""linux/mount.h"""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
"""linux/prctl.h"""

GUEST_MAKES: Final = ("dev", "proc", "run", "sys", "tmp")
"""Directories the guest makes in the new root; it stops where one exists."""
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")
_DEFAULT_PATH: Final = "/bin:/usr/bin"
"""Where execvpe of the C library looks without a PATH."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _check(code: int, what: str) -> None:
    if code != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave namespaces for new ones. Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def become_root() -> None:
    """Enter a user namespace whose only user and group are this one, as 0. Raises OSError."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        Path("/proc/self", name).write_text(text)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. Forgotten over fork."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            kind.encode() if kind is not None else None,
            ctypes.c_ulong(flags),
            data.encode() or None,
        ),
        f"mount {target}",
    )


def leave_host() -> None:
    """Enter new mount, network, IPC and UTS namespaces; mounts stay here from now on.

    Raises:
        OSError: not permitted.
    """
    unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)


def make_directories(root: str) -> None:
    """Make what the guest makes in the new root.

    Raises:
        FileExistsError: the archive brought it, and the guest stops.
    """
    for name in GUEST_MAKES:
        Path(root, name).mkdir(0o755)


def mount_all(root: str, *, tun: bool) -> None:
    """Mount what the guest mounts; the devices are a few of the host's.

    Args:
        root: of the program, with the directories made.
        tun: whether /dev/net/tun is among the devices.

    Raises:
        OSError: not permitted.
    """
    dev = Path(root, "dev")
    _mount("dev", str(dev), "tmpfs", _MS_NOSUID | _MS_NOEXEC, "mode=0755")
    for name in (*_DEVICES, *(("net/tun",) if tun else ())):
        if not Path("/dev", name).exists():
            continue
        node = dev / name
        node.parent.mkdir(exist_ok=True)
        node.touch()
        _mount(f"/dev/{name}", str(node), None, _MS_BIND)
    for name, kind, flags, data in (
        ("shm", "tmpfs", _QUIET, "mode=1777"),
        ("pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"),
    ):
        (dev / name).mkdir()
        _mount(name, str(dev / name), kind, flags, data)
    (dev / "ptmx").symlink_to("pts/ptmx")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        (dev / name).symlink_to(f"/proc/self/fd/{number}")
    (dev / "fd").symlink_to("/proc/self/fd")
    _mount("proc", str(Path(root, "proc")), "proc", _QUIET)
    _mount("tmpfs", str(Path(root, "run")), "tmpfs", _QUIET, "mode=0755")
    _mount("tmpfs", str(Path(root, "tmp")), "tmpfs", _QUIET, "mode=1777")
    # Read-only, unlike in a guest: for root this is the machine's own.
    with suppress(OSError):
        _mount("sysfs", str(Path(root, "sys")), "sysfs", _QUIET | _MS_RDONLY)


def problem(*, as_user: bool, folder: str) -> OSError | None:
    """Try everything that a program's surroundings need, in a process that is thrown away.

    Args:
        as_user: inside a user namespace.
        folder: an empty one to mount in.

    Returns:
        What went wrong; None: it works here.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            if as_user:
                become_root()
            unshare(CLONE_NEWPID)
            if os.fork() == 0:
                _try_all(write_end, folder)
            os.wait()
        except OSError as error:
            os.write(write_end, f"{error.errno} {error.strerror}".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as said:
        text = said.read().decode()
    os.waitpid(pid, 0)
    number, _, why = text.partition(" ")
    return None if number == "0" else OSError(int(number or 0), why or "no answer")


def _try_all(say: int, folder: str) -> NoReturn:
    try:
        leave_host()
        _mount("tmpfs", folder, "tmpfs", _QUIET)
        make_directories(folder)
        mount_all(folder, tun=False)
        os.write(say, b"0 ")
    except OSError as error:
        os.write(say, f"{error.errno} {error.strerror}".encode())
    finally:
        os._exit(0)


def inside(root: str, path: str) -> str:
    """Return where a path of the guest is below its root, seen from here.

    Absolute links lead to the root again, as they do for a program in it.
    """
    found: list[str] = []
    todo = [part for part in reversed(path.split("/")) if part]
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            found = found[:-1]
        elif part != ".":
            here = Path(root, *found, part)
            if here.is_symlink() and links < 40:
                links += 1
                target = os.fspath(here.readlink())
                found = [] if target.startswith("/") else found
                todo += [piece for piece in reversed(target.split("/")) if piece]
            else:
                found.append(part)
    return os.fspath(Path(root, *found))


def look_up(root: str, name: str, first_variable: str) -> str:
    """Return where a program is below the root, as the guest's execvpe finds it.

    Where it does not, the name comes back as it would be below the root.
    """
    if "/" in name:
        return inside(root, name)
    is_path = first_variable.startswith("PATH=")
    for folder in (first_variable[5:] if is_path else _DEFAULT_PATH).split(":"):
        candidate = inside(root, f"{folder}/{name}")
        with suppress(OSError):
            mode = Path(candidate).stat().st_mode
            if stat.S_ISREG(mode) and mode & 0o111:
                return candidate
    return inside(root, name)


def execute(
    argv: Sequence[str], envp: Sequence[str], *, root: str, chroot: bool, output: int, stdin: int
) -> NoReturn:
    """Become the program, in a child process. Never comes back.

    Args:
        argv: of the program; argv[0] is executed.
        envp: its environment; only envp[0] may say PATH, as in the guest.
        root: the unpacked tree.
        chroot: make it the root; else only the working directory.
        output: becomes stdout and stderr.
        stdin: becomes stdin.
    """
    os.setsid()
    for number, target in ((stdin, 0), (output, 1), (output, 2)):
        os.dup2(number, target, inheritable=True)
    path = argv[0]
    if chroot:
        os.chroot(root)
        os.chdir("/")
    else:
        path = look_up(root, path, envp[0])
        os.chdir(root)
        die_with_parent()
    os.umask(0o022)
    for number in signal.valid_signals():
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environb.clear()
    name, equals, value = _bytes(envp[0]).partition(b"=")
    if equals and name:
        os.environb[name] = value
    _libc.execvpe(_bytes(path), _strings(argv), _strings(envp))
    number = ctypes.get_errno()
    os.write(2, f"exec application: {os.strerror(number)}\n".encode())
    os._exit(-number & 0xFF)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(texts) + 1))(*map(_bytes, texts), None)
