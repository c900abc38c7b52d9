"""Owns: Python's side of faults.c: compile it, preload it, arm it."""

import ctypes
import errno
import os
import subprocess
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")

NONE, FAIL, SHORT, BROKEN, STRANGER, CROWD = range(6)
"""`enum action` of faults.c."""

NAMES = {"fail": FAIL, "short": SHORT, "broken": BROKEN, "stranger": STRANGER, "crowd": CROWD}

TRANSFERS = ("send", "recv", "read", "pread", "sendfile", "splice")
"""Calls that can move fewer bytes than asked for."""

CALLS = (
    *(
        "socket",
        "bind",
        "listen",
        "connect",
        "accept4",
        "getsockopt",
        "setsockopt",
        "shutdown",
        "close",
    ),
    *("ppoll", "fstat", "mmap", "munmap", "unlink", "sigpending", "sigtimedwait"),
    *("openat", "fstatat", "readlinkat", "syscall"),
    *TRANSFERS,
)
"""What the compiled module calls and faults.c can make fail."""

UNFAILING = ("clock_gettime", "pthread_sigmask", "fcntl", "sched_yield")
"""What the compiled module calls and Linux fails for invalid arguments only."""


@cache
def build(folder):
    """Compile the shim into a folder; return its path."""
    target = Path(folder) / "faults.so"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    done = subprocess.run(
        ["gcc", *flags, "-o", str(target), str(SOURCE), "-ldl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


class Faults:
    """The shim this process was started with."""

    def __init__(self):
        self._lib = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._lib.faults_cap.argtypes = [ctypes.c_size_t]

    def arm(self, call, action, value=0, *, nth=1, step=0, origin="core"):
        """Let `action` strike at the n-th call made by `origin`, and every `step`-th after it.

        `value` is an errno's name or number, or the stranger's CID. Origin "python" is every call
        that the compiled module does not make.
        """
        number = getattr(errno, value) if isinstance(value, str) else value
        name = call.encode()
        self._lib.faults_arm(name, origin == "core", nth, step, NAMES[action], number)

    def disarm(self):
        """Let every call through; return how often the plan has struck."""
        strikes = self._lib.faults_strikes()
        self._lib.faults_arm(b"", 0, 0, 0, NONE, 0)
        return strikes

    def cap(self, size):
        """Let no transfer of the compiled module move more than `size` bytes."""
        self._lib.faults_cap(size)

    def pretend_vsock(self, cid):
        """Back AF_VSOCK by Unix sockets whose peers show this CID."""
        self._lib.faults_pretend_vsock(cid)


def plans(action, calls=CALLS, value=0, **more):
    """Return one plan a call; `more` says by call what else is to be in it."""
    return [
        {"call": call, "action": action, "value": value, **more.get(call, {})} for call in calls
    ]


def check_clean(result, timeout):
    """Whatever came of it: in time, nothing leaked, no signal left."""
    assert result["seconds"] < timeout + 2, result
    assert (result["leaked"], result["left"]) == ([], []), result
    assert result["mask_kept"], result
    assert not result["sigpipe_pending"], result
