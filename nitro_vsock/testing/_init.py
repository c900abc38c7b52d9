"""Owns: the helper process of an emulator: a watcher, and in its namespaces the guest's init.

`python -m nitro_vsock.testing._init DESCRIPTOR`, started by sandbox.py; the descriptor is one end
of a socket pair, see control.py. The watcher ends everything when the emulator or init is gone,
however that came about. Must not know: sockets' addresses, the order of things.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, Final, NoReturn

from nitro_vsock.testing import control, namespaces, tap
from nitro_vsock.testing.unpack import UnpackError, remove_tree, unpack

NAMESPACES: Final = "namespaces"
USER_NAMESPACES: Final = "user namespaces"
PLAIN: Final = "plain"


def main() -> None:
    """Be the watcher."""
    try:
        emulator = os.pidfd_open(os.getppid())
    except OSError:
        emulator = -1  # the socket pair says it too, where nobody else holds its end
    host = socket.socket(fileno=int(sys.argv[1]))
    host.set_inheritable(False)
    os.umask(0o022)
    try:
        setup, _ = control.receive(host)
    except EOFError:
        return
    folder: str = setup["folder"]
    try:
        watch(host, emulator, setup)
    finally:
        if setup["temporary"]:
            remove_tree(folder)


def watch(host: socket.socket, emulator: int, setup: dict[str, Any]) -> None:
    """Start init and see to it that nothing of it is left."""
    namespaces.adopt_orphans()
    try:
        isolation = choose(setup["isolation"], setup["folder"])
        if isolation == USER_NAMESPACES:
            namespaces.become_root()
        if isolation != PLAIN:
            namespaces.unshare(namespaces.CLONE_NEWPID)
    except OSError as error:
        fail(host, "isolation", error)
        return
    control.send(host, {"event": "ready", "isolation": isolation})
    alive, lives = os.pipe()
    if os.fork() == 0:
        namespaces.die_with_parent()
        os.close(alive)
        with suppress(EOFError, BrokenPipeError):
            Init(host, setup["root"], isolation).run()
        os._exit(0)
    os.close(lives)
    poller = select.poll()
    poller.register(host, 0)  # hangs up; what it says is for init
    poller.register(alive, select.POLLIN)
    if emulator >= 0:
        poller.register(emulator, select.POLLIN)
    poller.poll()
    host.close()
    kill_descendants()


def choose(wanted: str, folder: str) -> str:
    """Return which isolation it will be.

    Raises:
        OSError: namespaces are wanted and not to be had.
    """
    if wanted == "plain":
        return PLAIN
    error = None
    if os.geteuid() == 0:
        error = namespaces.problem(as_user=False, folder=folder)
        if error is None:
            return NAMESPACES
    in_user = namespaces.problem(as_user=True, folder=folder)
    if in_user is None:
        return USER_NAMESPACES
    if wanted == "auto":
        return PLAIN
    raise error or in_user


def kill_descendants() -> None:
    """Kill children, and theirs once they have become ours, until there are none."""
    while True:
        with open("/proc/thread-self/children", "rb") as file:  # noqa: PTH123
            children = [int(pid) for pid in file.read().split()]
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def fail(host: socket.socket, what: str, error: BaseException) -> None:
    """Tell the emulator what did not work."""
    why = str(error)
    number = None
    if isinstance(error, OSError):
        number, why = error.errno, error.strerror or why
        if error.filename is not None:
            why = f"{os.fsdecode(error.filename)}: {why}"
    control.send(host, {"event": "failed", "what": what, "why": why, "errno": number})


class Init:
    """The guest's init: does what the emulator says, and reaps."""

    def __init__(self, host: socket.socket, root: str, isolation: str) -> None:
        self._host = host
        self._root = root
        self._isolation = isolation
        self._program = -1
        self._relay = -1

    def run(self) -> None:
        """Serve until the emulator is gone, which raises EOFError."""
        if self._isolation != PLAIN:
            try:
                namespaces.leave_host()
            except OSError as error:
                fail(self._host, "isolation", error)
                return
        child_died, wakes = os.pipe()
        for fd in (child_died, wakes):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        poller = select.poll()
        poller.register(self._host, select.POLLIN)
        poller.register(child_died, select.POLLIN)
        while True:
            ready = dict(poller.poll())
            if child_died in ready:
                with suppress(BlockingIOError):
                    os.read(child_died, 512)
                self._reap()
            if self._host.fileno() in ready:
                self._obey(*control.receive(self._host))

    def _obey(self, message: dict[str, Any], fds: list[int]) -> None:
        what = message["op"]
        try:
            if what == "unpack":
                self._unpack(fds[0], tun=message["tun"])
            elif what == "net":
                self._net(fds[0], message["mtu"])
            elif what == "run":
                self._run(message, fds[0] if fds else None)
            elif what == "signal":
                self._signal(message["number"])
            elif what == "close net":
                self._close_net()
        except (OSError, UnpackError) as error:
            fail(self._host, what, error)
        finally:
            for fd in fds:
                os.close(fd)

    def _unpack(self, archive: int, *, tun: bool) -> None:
        notes = unpack(archive, os.path.dirname(self._root))  # noqa: PTH120
        namespaces.make_directories(self._root)
        if self._isolation != PLAIN:
            namespaces.mount_all(self._root, tun=tun)
        control.send(self._host, {"event": "unpacked", "notes": notes})

    def _net(self, fd: int, mtu: int) -> None:
        device = None if self._isolation == PLAIN else tap.open_tap(mtu)
        self._relay = os.fork()
        if self._relay == 0:
            self._be_relay(fd, device, mtu)
        if device is not None:
            os.close(device)
        control.send(self._host, {"event": "connected", "tap": device is not None})

    def _be_relay(self, fd: int, device: int | None, mtu: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            self._host.close()
            namespaces.die_with_parent()
            tap.relay(device, socket.socket(fileno=fd), mtu + tap.ETHERNET)
        finally:
            os._exit(0)

    def _run(self, message: dict[str, Any], output: int | None) -> None:
        stdin = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        executed, executes = os.pipe()
        self._program = os.fork()
        if self._program == 0:
            try:
                signal.set_wakeup_fd(-1)
                namespaces.execute(
                    message["argv"],
                    message["envp"],
                    root=self._root,
                    chroot=self._isolation != PLAIN,
                    output=stdin if output is None else output,
                    stdin=stdin,
                )
            except BaseException as error:
                os.write(2, f"init: {error}\n".encode())
            finally:
                os._exit(255)
        os.close(stdin)
        os.close(executes)
        os.read(executed, 1)  # ends when the program runs, or never will
        os.close(executed)
        control.send(self._host, {"event": "running"})

    def _signal(self, number: int) -> None:
        """Forward a signal, and stop waiting: init's waitpid is interrupted by it."""
        if self._program > 0:
            os.kill(self._program, number)
        control.send(self._host, {"event": "signalled"})

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._relay:
                self._relay = -1
            elif pid == self._program:
                self._program = -1
                control.send(self._host, {"event": "exited", "status": status})

    def _close_net(self) -> None:
        if self._relay > 0:
            os.kill(self._relay, signal.SIGKILL)
            os.waitpid(self._relay, 0)
            self._relay = -1
        control.send(self._host, {"event": "closed"})


if __name__ == "__main__":
    main()
