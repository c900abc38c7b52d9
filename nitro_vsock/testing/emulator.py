"""Owns: the order of things in a guest's life, and where it is told to depart from it.

Must not know: how frames are decoded, how a program is run.
"""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nitro_vsock import errors, protocol
from nitro_vsock.core import Guard, sockets
from nitro_vsock.deadline import Deadline, Timeout
from nitro_vsock.launch import EnclaveArgs, EnclaveArgsReader, service_address
from nitro_vsock.protocol import VsockPortOffset
from nitro_vsock.testing import tap
from nitro_vsock.testing.sandbox import Sandbox
from nitro_vsock.testing.script import GuestReport, Isolation, Misbehaviour, Point
from nitro_vsock.transport import FD_MAX, Address, Holder, PathLike, VsockAddress, WakeUp

if TYPE_CHECKING:
    from typing_extensions import Self


CONNECT_TIMEOUT: Final = 5.0
"""Seconds the guest gives a proxy or the return code to connect."""

_INT: Final = struct.Struct("=i")
"""A signal number, a wait status: the machine's own int."""

_ABSURD_MTU: Final = b"\xff\xff\xff\xff"

_STOPPED: Final = 0x137F

_Choice = TypeVar("_Choice", Point, Misbehaviour, Isolation)


class _DiedError(Exception):
    """The guest is to be gone now."""


class _StalledError(Exception):
    """The guest was closed where it had been told to stay."""


class GuestEmulator(Holder):
    """One enclave's guest: boots, takes a launch, runs its program, reports, goes down.

    It does what the real guest does, in its order: the arguments (port CID + 1), then the output
    (+3) and the network (+2) where the launch asks for them, the signal handler (+5), the program,
    and at its end the return code (+4). Each connection is tried once. A SIGTERM that comes before
    the program runs is lost; after one that was forwarded the guest waits no longer and reports 0.

    Use it as a context manager. `close`, and leaving the context, end everything at once and may be
    called from any thread; what runs in the guest is killed.

    The isolation keeps accidents in, not attacks: run programs you trust.
    """

    def __init__(
        self,
        cid: int,
        *,
        uds_path: PathLike | None = None,
        host_cid: int = protocol.VMADDR_CID_HOST,
        folder: PathLike | None = None,
        strict: bool = True,
        isolation: Isolation | str = Isolation.AUTO,
        mtu: int = 1500,
        die_at: Point | str | None = None,
        stall_at: Point | str | None = None,
        misbehave: Misbehaviour | str | None = None,
        timeout: Timeout = 60.0,
        console: int | None = None,
        on_point: Callable[[Point], object] | None = None,
    ) -> None:
        """Check the arguments; nothing is connected, started or unpacked yet.

        Args:
            cid: of the enclave this stands for.
            uds_path: base path of a hybrid vsock, in place of AF_VSOCK.
            host_cid: where to connect: 2 from a guest, 1 over vsock loopback.
            folder: where to unpack; the tree is <folder>/rootfs and stays. By default a temporary
                one, which is removed at the end.
            strict: refuse what the real guest would fail on, see `EnclaveArgsReader`.
            isolation: what surrounds the program.
            mtu: of the network device, 68 to 65521; the host is told 14 more.
            die_at: every connection vanishes there, and the program.
            stall_at: stay there with everything open, until closed or the deadline.
            misbehave: what to do that no guest does.
            timeout: seconds or PollTimeout from boot to the end.
            console: a descriptor for what goes to the real guest's console: the program's output
                where the launch does not ask for it to be sent. It is thrown away by default.
            on_point: called with each Point when it is reached, in the guest's thread.

        Raises:
            InvalidArgumentError: names the field, the value and the limit.
        """
        self._closing = True
        self._hang_up = self._lifeline = -1
        self._addresses: dict[VsockPortOffset, Address] = {
            service: _address(cid, service, uds_path, host_cid)
            for service in VsockPortOffset
            if service is not VsockPortOffset.CONSOLE
        }
        self.cid = cid
        self._reader_options: dict[str, Any] = {
            "uds_path": uds_path,
            "host_cid": host_cid,
            "strict": strict,
        }
        self._folder = _check_folder(folder)
        self._isolation = _choose(Isolation, "isolation", isolation)
        self._mtu = errors.require_int("mtu", mtu, tap.MIN_MTU, tap.MAX_MTU)
        self._die_at = None if die_at is None else _choose(Point, "die_at", die_at)
        self._stall_at = None if stall_at is None else _choose(Point, "stall_at", stall_at)
        self._misbehave = (
            None if misbehave is None else _choose(Misbehaviour, "misbehave", misbehave)
        )
        Deadline.after(timeout)
        self._timeout = timeout
        self._console = (
            None if console is None else errors.require_int("console", console, 0, FD_MAX)
        )
        self._on_point = on_point

        self._lock = threading.Condition()
        self._points: list[Point] = []
        self._spent = False
        self._over = False
        self._runner: int | None = None
        self._result: GuestReport | BaseException | None = None
        self._thread: threading.Thread | None = None
        self._reader: EnclaveArgsReader | None = None
        super().__init__(WakeUp())
        self._hang_up, self._lifeline = os.pipe()

    def fileno(self) -> int:
        """A descriptor that hangs up (POLLHUP) when the guest is gone, as an enclave's does.

        It is valid until `close`, -1 from then on.
        """
        return self._hang_up

    @property
    def points(self) -> tuple[Point, ...]:
        """The points reached so far."""
        with self._lock:
            return tuple(self._points)

    def run(self) -> GuestReport:
        """Boot, and live until the guest goes down. Once per emulator.

        Raises:
            NitroVsockError: what `EnclaveArgsReader.read_args` raises; the same for the other
                connections; GuestRuleError where the guest stops while it unpacks; UnsupportedError
                where this machine lacks what the isolation or the network needs; DeadlineError;
                ClosedError where it was closed meanwhile.
            OSError: the archive could not be stored.
        """
        with self._in_use():
            if self._spent:
                raise errors.ClosedError("this GuestEmulator has been used")
            self._spent = True
            self._runner = threading.get_ident()
            try:
                self._result = _Life(self).live()
            except BaseException as error:
                self._result = error
                raise
            finally:
                self._go_down()
            return self._result

    def start(self) -> Self:
        """Boot in a thread of its own; `result` has the outcome. Once per emulator.

        Raises:
            ClosedError: closed, or booted before.
        """
        with self._lock:
            if self._spent or self._thread is not None or self._closing:
                raise errors.ClosedError("this GuestEmulator has been used or closed")
            name = f"guest {self.cid}"
            self._thread = threading.Thread(target=self._run_quietly, name=name, daemon=True)
            self._thread.start()
        return self

    def _run_quietly(self) -> None:
        try:
            self.run()
        except BaseException as error:
            with self._lock:
                self._result = error  # ClosedError in place of what close() made of it
        finally:
            self._go_down()

    def result(self, timeout: float | None = None) -> GuestReport:
        """Wait for a guest that was started to go down; return its report.

        Args:
            timeout: seconds; without limit by default, but see the emulator's own.

        Raises:
            NitroVsockError, OSError: as `run` does.
            TimeoutError: the guest is still there.
            ClosedError: it was never started.
        """
        if self._thread is None:
            raise errors.ClosedError("this GuestEmulator was not started")
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the guest is still there after {timeout} s")
        if isinstance(self._result, GuestReport):
            return self._result
        assert self._result is not None  # noqa: S101 - the thread is over
        raise self._result

    def wait_for(self, point: Point | str, timeout: float = 10.0) -> None:
        """Wait until the guest has reached a point.

        Args:
            point: which.
            timeout: seconds.

        Raises:
            ClosedError: the guest went down without reaching it.
            TimeoutError: not in time.
        """
        wanted = _choose(Point, "point", point)
        with self._lock:
            if not self._lock.wait_for(lambda: wanted in self._points or self._over, timeout):
                raise TimeoutError(f"the guest did not reach {wanted} in {timeout} s")
            if wanted not in self._points:
                raise errors.ClosedError(f"the guest went down without reaching {wanted}")

    def close(self) -> None:
        """End everything now and wait until it has ended. From any thread, any number of times."""
        self._closing = True
        self._wake_up.set()
        with self._lock:
            reader, thread = self._reader, self._thread
        if reader is not None:
            reader.cancel()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if self._runner not in (None, threading.get_ident()):
            with self._lock:
                self._lock.wait_for(lambda: self._over)
        super().close()

    def _release(self) -> None:
        self._go_down()
        fd, self._hang_up = self._hang_up, -1
        if fd >= 0:
            os.close(fd)
        self._wake_up.close()

    def _go_down(self) -> None:
        """Hang up."""
        with self._lock:
            self._over = True
            fd, self._lifeline = self._lifeline, -1
            self._lock.notify_all()
        if fd >= 0:
            os.close(fd)

    def _reach(self, point: Point) -> None:
        with self._lock:
            self._points.append(point)
            self._lock.notify_all()
        if self._on_point is not None:
            self._on_point(point)

    def _attend(self, reader: EnclaveArgsReader | None) -> None:
        """Let `close` cancel a reader."""
        with self._lock:
            self._reader = reader
        if reader is not None and self._closing:
            reader.cancel()

    def __repr__(self) -> str:
        return f"<GuestEmulator CID {self.cid}>"


class _Reader(EnclaveArgsReader):
    """Says where it is."""

    def __init__(
        self, at: Callable[[Point, EnclaveArgs | None], None], cid: int, **options: Any
    ) -> None:
        super().__init__(cid, **options)
        self._say = at

    def _at(self, step: str, args: EnclaveArgs | None = None) -> None:
        self._say(Point(step), args)


class _Life:
    """A guest's life: what it holds, and what the report will say."""

    def __init__(self, guest: GuestEmulator) -> None:
        self._guest = guest
        self._deadline = Deadline.after(guest._timeout)
        self._began = time.monotonic()
        self._report = GuestReport()
        self._misbehave = guest._misbehave
        self._held = ExitStack()
        self._sandbox: Sandbox | None = None
        self._output: socket.socket | None = None
        self._signals: socket.socket | None = None
        self._ended_signals = False

    def live(self) -> GuestReport:
        with self._held:
            try:
                self._live()
            except _DiedError:
                self._note(died_at=self._guest._die_at)
            except _StalledError:
                self._note(stalled_at=self._guest._stall_at)
        return self._report

    def _live(self) -> None:
        if self._misbehave is Misbehaviour.WRONG_READY:
            self._say_wrong_ready()
            return
        file = tempfile.TemporaryFile(dir=self._guest._folder)  # noqa: SIM115 - until the end
        archive = self._held.enter_context(file)
        args = self._take_args(archive.fileno())
        sandbox = self._sandbox
        assert sandbox is not None  # noqa: S101 - made when the host was connected
        self._note(isolation=sandbox.ready(self._wait))
        notes = sandbox.unpack(archive.fileno(), self._wait, tun=args.network_proxy)
        self._note(notes=tuple(notes))
        archive.close()
        self._at(Point.UNPACKED)
        if args.app_output:
            self._output = self._connect(VsockPortOffset.APP_OUTPUT)
            self._at(Point.OUTPUT)
        if args.network_proxy:
            self._connect_net(sandbox)
        self._signals = self._connect(VsockPortOffset.SIGNAL_HANDLER)
        self._at(Point.SIGNAL)
        self._run_program(sandbox, args)
        self._at(Point.EXITED)
        self._close_proxies(sandbox)
        if self._misbehave is not Misbehaviour.NO_RETURN_CODE:
            self._report_status()
        self._look_after_program(sandbox)

    # the arguments

    def _say_wrong_ready(self) -> None:
        self._at(Point.CONNECT)
        sock = self._connect(VsockPortOffset.ARGS_READER)
        self._at(Point.HANDSHAKE)
        with suppress(ConnectionError):
            sock.send(b"\0", socket.MSG_NOSIGNAL)
            while True:
                self._wait(sock.fileno())
                if not sock.recv(4096):
                    break

    def _take_args(self, archive: int) -> EnclaveArgs:
        guest = self._guest
        reader = _Reader(self._at_args, guest.cid, **guest._reader_options)
        pieces = 0

        def store(piece: memoryview) -> None:
            nonlocal pieces
            while piece:
                piece = piece[os.write(archive, piece) :]
            pieces += 1
            if pieces == 1:
                self._at(Point.ROOTFS)

        with reader:
            guest._attend(reader)
            try:
                return reader.read_args(store, self._left())
            except errors.DeadlineError as error:
                error.explain("the guest's time is over")
                raise
            finally:
                guest._attend(None)

    def _at_args(self, point: Point, args: EnclaveArgs | None) -> None:
        self._note(args=args)
        self._at(point)
        if point is Point.ARGUMENTS:
            self._start_sandbox()  # it gets ready meanwhile

    def _start_sandbox(self) -> None:
        folder = self._guest._folder
        temporary = folder is None
        if folder is None:
            folder = tempfile.mkdtemp(prefix="nitro_vsock-guest-")
        root = str(Path(folder).resolve() / protocol.ROOTFS_PREFIX)
        isolation = self._guest._isolation.value
        try:
            sandbox = Sandbox(folder, root, isolation, temporary=temporary)
        except BaseException:
            if temporary:
                Path(folder).rmdir()
            raise
        self._held.callback(sandbox.end)
        self._sandbox = sandbox
        self._note(root=root)

    # the proxies and the program

    def _connect_net(self, sandbox: Sandbox) -> None:
        sock = self._connect(VsockPortOffset.NET)
        mtu = self._guest._mtu
        header = tap.HEADER.pack(mtu + tap.ETHERNET)
        if self._misbehave is Misbehaviour.ABSURD_MTU:
            header = _ABSURD_MTU
        elif self._misbehave is Misbehaviour.CUT_MTU:
            header = header[:2]
        elif self._misbehave is Misbehaviour.LONG_FRAME:
            header += tap.HEADER.pack(0x7FFFFFFF) + bytes(64)
        with suppress(ConnectionError):  # the real guest does not look either
            sock.sendall(header, socket.MSG_NOSIGNAL)
        if self._misbehave is Misbehaviour.CUT_MTU:
            sock.close()
        elif not sandbox.connect_net(sock, mtu, self._wait):
            note = "no network: without namespaces there is no tap device, frames are thrown away"
            self._note(notes=(*self._report.notes, note))
        sock.close()  # the helper's is left
        self._at(Point.NET)

    def _run_program(self, sandbox: Sandbox, args: EnclaveArgs) -> None:
        """Run the program until it ends, or SIGTERM is forwarded to it."""
        output = self._guest._console if self._output is None else self._output.fileno()
        self._take_signals(running=False)
        # What comes from here on is forwarded: the real guest forks, and listens at once.
        sandbox.run(args.argv, args.envp, output, self._wait)
        self._at(Point.RUNNING)
        signals = self._signals
        assert signals is not None  # noqa: S101 - always connected
        while self._report.program_status is None and not self._report.forwarded:
            watched = [sandbox.fileno()]
            # Its end is a SIGTERM, again and again: nothing to wait for.
            terminate = self._ended_signals and self._forwards
            if not self._ended_signals:
                watched.append(signals.fileno())
            if not terminate:
                ready = self._wait(*watched)
                if sandbox.fileno() in ready:
                    self._exited(sandbox.receive())
                    continue
                terminate = self._take_signals(running=True)
            if terminate:
                sandbox.signal(signal.SIGTERM)
                self._wait(sandbox.fileno())
                event = sandbox.receive()
                if event["event"] == "signalled":
                    self._note(forwarded=True)
                else:
                    self._exited(event)

    def _close_proxies(self, sandbox: Sandbox) -> None:
        for sock in (self._output, self._signals):
            if sock is not None:
                sock.close()
        sandbox.close_net()
        event: dict[str, Any] = {}
        while event.get("event") != "closed":
            self._wait(sandbox.fileno())
            event = sandbox.receive()
            self._exited(event)

    @property
    def _forwards(self) -> bool:
        return self._misbehave is not Misbehaviour.IGNORE_SIGTERM

    def _exited(self, event: dict[str, Any]) -> None:
        if event["event"] == "exited":
            self._note(program_status=event["status"])

    def _take_signals(self, *, running: bool) -> bool:
        """Read what has come over the signal connection; return whether SIGTERM is to be forwarded.

        Before the program runs nothing is forwarded: the real guest ignores SIGTERM until then.
        """
        signals = self._signals
        assert signals is not None  # noqa: S101 - always connected
        while not self._ended_signals:
            try:
                data = signals.recv(_INT.size)
            except BlockingIOError:
                return False
            except ConnectionError:
                data = b""
            number = int(signal.SIGTERM)
            if len(data) == _INT.size:
                (number,) = _INT.unpack(data)
            self._ended_signals = not data
            self._note(signals=(*self._report.signals, number))
            if number != signal.SIGTERM:
                continue
            if running:
                if self._forwards:
                    return True
            elif data:
                self._note(signals_lost=self._report.signals_lost + 1)
        return False

    # the end

    def _report_status(self) -> None:
        sock = self._connect(VsockPortOffset.RETURN_CODE)
        self._at(Point.RETURN_CODE)
        status = 0 if self._report.forwarded else self._report.program_status
        assert status is not None  # noqa: S101 - one of the two ended the program
        if self._misbehave is Misbehaviour.NO_WAIT_STATUS:
            status = _STOPPED
        data = _INT.pack(status)
        if self._misbehave is Misbehaviour.SHORT_RETURN_CODE:
            data = data[:2]
        try:
            sock.send(data, socket.MSG_NOSIGNAL)
            if self._misbehave is Misbehaviour.SHORT_RETURN_CODE:
                sock.close()
                return
            self._note(status=status)
            self._at(Point.REPORTED)
            if self._misbehave is not Misbehaviour.UNREAD_ANSWER:
                self._wait(sock.fileno())
                self._note(answer=sock.recv(_INT.size))
        except ConnectionError:
            self._note(answer=b"")
        sock.close()

    def _look_after_program(self, sandbox: Sandbox) -> None:
        """Say how a program ended that nobody waited for, where it has."""
        if self._report.program_status is None:
            with suppress(errors.NitroVsockError):
                if _ready([sandbox.fileno()], 0):
                    self._exited(sandbox.receive())

    # what all of them need

    def _note(self, **found: Any) -> None:
        self._report = dataclasses.replace(self._report, **found)

    def _at(self, point: Point) -> None:
        """A point is reached: die or stay here where that is wanted."""
        seconds = {**self._report.seconds, point.value: time.monotonic() - self._began}
        self._note(seconds=seconds)
        self._guest._reach(point)
        if point is self._guest._die_at:
            raise _DiedError
        if point is self._guest._stall_at:
            try:
                self._wait()
            except errors.LaunchCancelledError:
                raise _StalledError from None

    def _left(self) -> float:
        """Seconds to the deadline."""
        return max(self._deadline.ns - time.monotonic_ns(), 0) / 1e9

    def _wait(self, *fds: int) -> set[int]:
        """Wait until one of the descriptors is readable or has hung up; return which are.

        Raises:
            LaunchCancelledError: closed.
            DeadlineError: the guest's time is over.
        """
        wake_up = self._guest._wake_up.fileno()
        ready = _ready([wake_up, *fds], self._left())
        if wake_up in ready:
            raise errors.LaunchCancelledError("the guest was closed")
        if not ready:
            last = self._guest.points[-1:]
            raise errors.DeadlineError(
                f"the guest's time is over; it came to {last[0] if last else 'nothing'}"
            )
        return ready

    def _connect(self, service: VsockPortOffset) -> socket.socket:
        """Connect to a service, once; what comes back is non-blocking, but for the output's.

        Raises:
            VsockConnectError, ConnectTimeoutError, UnsupportedError: no connection.
        """
        address = self._guest._addresses[service]
        ns = min(self._deadline.ns, time.monotonic_ns() + int(CONNECT_TIMEOUT * 1e9))
        guard = Guard(Deadline(ns), self._guest._wake_up.fileno())
        try:
            if isinstance(address, VsockAddress):
                fd = sockets.connect_vsock(address.cid, address.port, guard)
            else:
                fd = sockets.connect_unix(os.fsencode(address.path), guard)
        except errors.NitroVsockError as error:
            error.explain(f"{address}, {service.name.lower()}: the real guest tries once, too")
            raise
        sock = self._held.enter_context(socket.socket(fileno=fd))
        # The program's stdout has to block, as everybody expects.
        sock.setblocking(service is VsockPortOffset.APP_OUTPUT)
        return sock


def _ready(fds: list[int], seconds: float) -> set[int]:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    end = time.monotonic() + seconds
    while True:
        left = max(end - time.monotonic(), 0)
        # Rounded up: a poll that comes back early would spin. Cut: a poll takes a C int.
        found = poller.poll(min(int(left * 1000) + (left > 0), 1 << 30))
        if found or left <= 0:
            return {fd for fd, _ in found}


def _address(
    cid: int, service: VsockPortOffset, uds_path: PathLike | None, host_cid: int
) -> Address:
    address = service_address(cid, service, uds_path)
    if isinstance(address, VsockAddress):
        errors.require_int("host_cid", host_cid, 0, protocol.VMADDR_CID_ANY - 1)
        address = VsockAddress(host_cid, address.port)
    return address


def _choose(kind: type[_Choice], field: str, value: object) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(choice.value for choice in kind)
        raise errors.InvalidArgumentError(field, value, f"must be one of {names}") from None


def _check_folder(folder: PathLike | None) -> str | None:
    if folder is None:
        return None
    try:
        path = Path(os.fsdecode(folder))
        is_folder = path.is_dir()
    except (TypeError, ValueError) as error:
        raise errors.InvalidArgumentError("folder", folder, f"must be a path ({error})") from None
    if not is_folder:
        raise errors.InvalidArgumentError("folder", folder, "must be a directory that exists")
    if os.path.lexists(path / protocol.ROOTFS_PREFIX):
        limit = f"must not have {protocol.ROOTFS_PREFIX} in it yet"
        raise errors.InvalidArgumentError("folder", folder, limit)
    return str(path.resolve())
