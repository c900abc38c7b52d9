"""Owns: the host's side of an enclave's life: what is bound together, the phases, their deadlines.

Must not know: how a launch is sent, what a proxy does with its connection.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from nitro_vsock.core import FOREVER_NS, Guard
from nitro_vsock.deadline import Deadline
from nitro_vsock.errors import (
    ClosedError,
    EnclaveDiedError,
    InvalidArgumentError,
    NitroVsockError,
    SessionTimeoutError,
    Stage,
    from_errno,
    require_int,
)
from nitro_vsock.launch import (
    DeviceService,
    EnclaveArgsWriter,
    LaunchReport,
    check_enclave_fd,
    check_peer_cid,
    service_address,
)
from nitro_vsock.progress import Progress
from nitro_vsock.protocol import MIN_CID, VMADDR_CID_ANY, VsockPortOffset
from nitro_vsock.session import signals
from nitro_vsock.session.ports import LAST_PORT, Port, bind, complete
from nitro_vsock.session.services.console import Console, ConsoleService
from nitro_vsock.session.services.exit_status import ReturnCodeService, WaitStatus
from nitro_vsock.session.services.network import NetService
from nitro_vsock.session.services.output import OutputService
from nitro_vsock.session.services.signal import SignalHandler, SignalService
from nitro_vsock.session.signals import WakeUpPipe
from nitro_vsock.session.timeouts import UNPACK_RATE, SessionTimeouts
from nitro_vsock.transport import (
    READABLE,
    Address,
    EventLoop,
    Holder,
    Listener,
    PathLike,
    Strategy,
    WakeUp,
)

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger("nitro_vsock")

_SLURPS: Final = 64
"""Rounds of taking what has come already: more than any socket holds, and an end with a guest that
never stops talking."""

_Service = TypeVar("_Service", bound=DeviceService)


@contextmanager
def _woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """See to it that a signal's handler runs at once while the loop waits."""
    pipe = WakeUpPipe()
    try:
        if pipe.fileno() >= 0:
            loop.add_reader(pipe.fileno(), pipe.clear)
        yield
    finally:
        if pipe.fileno() >= 0:
            with suppress(RuntimeError):  # the loop is closed
                loop.remove_reader(pipe.fileno())
        pipe.close()


@dataclass(frozen=True)
class ExitStatus(WaitStatus):
    """How a session ended.

    Attributes:
        status: the wait status, as the guest sent it.
        terminated: a SIGTERM was written to the guest. It then reports status 0, whatever the
            program did.
        output_complete: the guest closed its output. False where something in it still held it open
            when nothing had come for `SessionTimeouts.drain`, or the enclave was gone before.
        launch: what the launch did.
    """

    terminated: bool = False
    output_complete: bool = True
    launch: LaunchReport | None = field(default=None, compare=False)


class EnclaveSession(Holder):
    """The host's side of one enclave, from before it boots until its program has ended.

    `terminate`, `cancel` and `close` may be called from any thread and from signal handlers.
    """

    def __init__(
        self,
        writer: EnclaveArgsWriter,
        cid: int,
        *,
        uds_path: PathLike | None = None,
        peer_cid: int | None = None,
        strict_peer: bool = False,
        strategy: Strategy | str = Strategy.AUTO,
        preflight: bool = True,
        timeouts: SessionTimeouts | None = None,
    ) -> None:
        """Open the proxies and bind every port, before the enclave boots; or none.

        The services are those of `writer.proxies`. A SignalHandler and a ReturnCode are there
        always, and an OutputProxy to the logger `nitro_vsock.output` where the writer's flag asks
        for output and no proxy takes it.

        Args:
            writer: what to launch.
            cid: of the enclave; ports CID + 1 to CID + 5. See `EnclaveArgsWriter.listen`.
            uds_path: see there.
            peer_cid: see there; it holds for every port.
            strict_peer: see there; for the arguments' port only.
            strategy: see there.
            preflight: see there.
            timeouts: of the phases.

        Raises:
            InvalidArgumentError: also where two proxies want one port, or the writer's flag
                network_proxy has no NetProxy: the guest would wait for ever.
            ProxyError: a proxy's own end cannot be opened.
            PreflightError, SourceReadError, VsockBindError, UnsupportedError: as `listen` does.
        """
        self._closing = True
        timeouts = SessionTimeouts() if timeouts is None else timeouts
        if not isinstance(timeouts, SessionTimeouts):
            raise InvalidArgumentError("timeouts", timeouts, "must be SessionTimeouts")
        wanted = check_peer_cid(cid if peer_cid is None else peer_cid)
        proxies = complete(writer)
        if any(isinstance(proxy, Console) for proxy in proxies):
            most = LAST_PORT - VsockPortOffset.CONSOLE
            require_int("cid", cid, MIN_CID, most, "the console's port is CID + 10000")
        for proxy in proxies:  # before a proxy empties a file
            service_address(cid, VsockPortOffset(proxy.port_offset), uds_path)
        with ExitStack() as stack:
            wake_up = WakeUp()
            stack.callback(wake_up.close)
            self._nudge = WakeUp()
            stack.callback(self._nudge.close)
            self._ports: list[Port] = []
            for proxy in proxies:
                port = Port(int(proxy.port_offset), proxy.open())
                stack.callback(port.service.close)
                if isinstance(port.service, (NetService, ReturnCodeService)):
                    port.service.guest = writer.guest
                self._ports.append(port)
            self._launch = writer.listen(
                cid,
                uds_path=uds_path,
                peer_cid=VMADDR_CID_ANY if wanted is None else wanted,
                strict_peer=strict_peer,
                strategy=strategy,
                preflight=preflight,
            )
            stack.callback(self._launch.close)
            for port in self._ports:
                if not isinstance(port.service, ConsoleService):
                    port.listener = bind(cid, port.offset, uds_path, wake_up)
                    stack.callback(port.listener.close)
            stack.pop_all()
        super().__init__(wake_up)
        self.cid = cid
        self._uds_path = uds_path
        self.timeouts = timeouts
        self.launch_report: LaunchReport | None = None
        """What the launch did, once it is done."""
        self._peer_cid = wanted
        self._rootfs_bytes = self._launch.rootfs_bytes
        self._loop = EventLoop()
        self._stage = Stage.ACCEPT
        self._asked: deque[None] = deque()
        """Calls of `terminate`: appending is atomic, among threads and signal handlers."""
        self._forwarded = 0
        self._stop_ns = FOREVER_NS
        self._spent = False
        self._is_dead = False
        self._signal = self._service(SignalService)
        self._code = self._service(ReturnCodeService)
        self._signals = next(p.signals for p in proxies if isinstance(p, SignalHandler))

    def _service(self, kind: type[_Service]) -> _Service:
        for port in self._ports:
            if isinstance(port.service, kind):
                return port.service
        raise AssertionError(f"a session without {kind.__name__}")

    @property
    def stage(self) -> Stage:
        """What is going on: accept until the launch is done, then services, run, drain."""
        return self._stage

    @property
    def last_output(self) -> tuple[str, ...]:
        """The last lines of output, or of the console where there is none; 20 at most."""
        for service in sorted(self._outputs(), key=lambda s: isinstance(s, ConsoleService)):
            if lines := service.tail.lines():
                return lines
        return ()

    @property
    def strangers_refused(self) -> int:
        """Connections from other CIDs that were dropped, the launch's not counted."""
        return sum(port.listener.strangers for port in self._ports if port.listener is not None)

    def terminate(self) -> None:
        """Ask the program to end: write one SIGTERM, as soon as the guest is there to read it.

        While the launch is being sent it is cancelled instead (LaunchCancelledError): no program
        runs that could end by itself. A SIGTERM that reaches a guest which has not started its
        program yet is lost there; `SessionTimeouts.stop` bounds the waiting.
        """
        self._asked.append(None)
        self._nudge.set()

    def cancel(self) -> None:
        """End a running session, or the next one, with LaunchCancelledError.

        The program is not asked: end the enclave.
        """
        self._wake_up.set()
        self._launch.cancel()

    def run_sync(
        self,
        *,
        enclave_fd: int | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> ExitStatus:
        """Launch, run the proxies and return what became of the program. Once per session.

        Everything runs in this thread. In the main thread the signals of the SignalHandler are
        passed on meanwhile.

        Args:
            enclave_fd: the enclave's descriptor: a hang-up there ends the session.
            progress: see `Launch.send`.

        Raises:
            NitroVsockError: as `Launch.send` does, until the guest has taken everything. Later:
            SessionTimeoutError: a phase took too long; `stage` says which.
            EnclaveDiedError: enclave_fd hung up, or the guest closed its signal connection, and no
                return code came.
            ReturnCodeError: the guest did not say what became of the program.
            ProxyError: a proxy's own end failed.
            LaunchCancelledError, ClosedError, BusyError, InvalidArgumentError: as their names say.
            Exception: what a callback or a proxy of the caller's raised.

        Each NitroVsockError has the last lines of output in `last_output`. After an error with
        `must_terminate_enclave` end the enclave.
        """
        watch_fd = check_enclave_fd(enclave_fd)
        with self._in_use():
            if self._spent:
                raise ClosedError("this EnclaveSession has been used; make another one")
            self._spent = True
            try:
                with signals.lent(self._signals, lambda _: self.terminate()):
                    return self._run(enclave_fd, watch_fd, progress)
            except NitroVsockError as error:
                if self._stage is Stage.ACCEPT:
                    self._slurp()
                if error.stage is None:  # of a service, which does not know
                    launching = self._stage is Stage.ACCEPT
                    error.stage = self._launch.meter.stage if launching else self._stage
                error.last_output = self.last_output
                logger.debug("session for CID %d failed: %s", self.cid, error)
                raise
            finally:
                self._hang_up()

    async def run(
        self,
        *,
        enclave_fd: int | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> ExitStatus:
        """Do the same under asyncio, in a thread of its own.

        Cancelling the task ends the session, and waits for that, which takes a moment. Callbacks
        are called in the session's thread.

        Args:
            enclave_fd: see `run_sync`.
            progress: see `run_sync`.

        Raises:
            NitroVsockError: as `run_sync` does.
            asyncio.CancelledError: the task was cancelled.
        """
        import asyncio  # here, because most of its users have it anyway and others never need it

        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        # The thread must not keep the coroutine: it is to be collected when its loop was closed.
        wake = weakref.ref(done)
        outcome: list[ExitStatus | BaseException] = []

        def work() -> None:
            try:
                outcome.append(self.run_sync(enclave_fd=enclave_fd, progress=progress))
            except BaseException as error:
                outcome.append(error)
            finally:
                event = wake()
                with suppress(RuntimeError):  # the loop is closed: nobody waits
                    if event is not None:
                        loop.call_soon_threadsafe(event.set)

        thread = threading.Thread(target=work, name=f"nitro_vsock session {self.cid}")
        cancelled: asyncio.CancelledError | None = None
        with signals.lent(self._signals, lambda _: self.terminate()), _woken_by_signals(loop):
            thread.start()
            try:
                while not done.is_set():
                    try:
                        await done.wait()
                    except asyncio.CancelledError as error:
                        cancelled = error
                        self.cancel()
            finally:
                if not done.is_set():  # the coroutine is being thrown away
                    self.cancel()
                if thread is not threading.current_thread():  # whose garbage collector it may be
                    thread.join()
        result = outcome.pop()
        if cancelled is not None:
            result = cancelled
        if isinstance(result, BaseException):
            try:
                raise result
            finally:
                del result, cancelled  # the traceback has this frame
        return result

    def close(self) -> None:
        """Close now, or as soon as a running call has been woken. From any thread, repeatedly."""
        self._launch.cancel()
        super().close()

    def _run(
        self,
        enclave_fd: int | None,
        watch_fd: int,
        progress: Callable[[Progress], object] | None,
    ) -> ExitStatus:
        for port in self._ports:
            if port.listener is not None:
                self._listen(port, port.listener)
        pipe = WakeUpPipe()
        try:
            if pipe.fileno() >= 0:
                self._loop.watch(pipe.fileno(), READABLE, lambda _: pipe.clear())
            self._loop.watch(self._nudge.fileno(), READABLE, lambda _: self._nudge.clear())
            self.launch_report = self._launch.send(
                self.timeouts.launch, progress, enclave_fd=enclave_fd, on_tick=self._tick
            )
            self._launch.close()
            guard = Guard(Deadline(FOREVER_NS), self._wake_up.fileno(), watch_fd)
            guard.wait.tick_ns = FOREVER_NS
            return self._serve(guard)
        finally:
            self._loop.unwatch(pipe.fileno())
            pipe.close()

    def _tick(self) -> None:
        """Look around while the launch is sent: the console, connections of strangers, SIGTERM."""
        for port in self._ports:
            if isinstance(port.service, ConsoleService):
                port.service.attempt(self._address(port.offset), self._loop)
        self._loop.poll()
        if self._asked:
            self._stop_launching()

    def _stop_launching(self) -> None:
        meter = self._launch.meter
        if meter.stage is not Stage.CLOSE:  # then the guest may run its program
            raise from_errno(errno.ECANCELED, meter.stage, bytes_sent=meter.done, total=meter.total)
        self._begin_to_stop()
        if time.monotonic_ns() >= self._stop_ns:
            raise self._overdue(Stage.STOP)

    def _address(self, offset: int) -> Address:
        return service_address(self.cid, VsockPortOffset(offset), self._uds_path)

    def _listen(self, port: Port, listener: Listener) -> None:
        def arrived(_events: int) -> None:
            connection = listener.accept(self._peer_cid)
            if connection is None:
                return
            self._loop.unwatch(listener.fileno())
            listener.close_quietly()
            port.connection = connection
            logger.debug("the guest connected to %s", listener.address)
            port.service.connected(connection, self._loop)

        self._loop.watch(listener.fileno(), READABLE, arrived)

    def _serve(self, guard: Guard) -> ExitStatus:
        self._stage = Stage.SERVICES
        services = self.timeouts.services
        if services is None:
            services = 60 + self._rootfs_bytes / UNPACK_RATE
        self._wait(guard, Deadline.after(services), self._all_connected)
        self._stage = Stage.RUN
        run = self.timeouts.run
        limit = Deadline(FOREVER_NS) if run is None else Deadline.after(run)
        self._wait(guard, limit, lambda: self._code.status is not None)
        self._stage = Stage.DRAIN
        for port in self._ports:
            if isinstance(port.service, NetService):
                port.service.program_ended()
        status = self._code.status
        assert status is not None  # noqa: S101 - waited for
        complete = self._drain(guard, self._output_finished)
        self._code.answer()
        self._drain(guard, self._guest_closed)
        for port in self._ports:
            port.close()  # an output may say only now that it could not be written
        return ExitStatus(status.status, self._signal.written > 0, complete, self.launch_report)

    def _all_connected(self) -> bool:
        """The signal connection is the last that the guest makes before its program runs."""
        return self._code.status is not None or all(
            port.connection is not None
            for port in self._ports
            if port.listener is not None and port.service is not self._code
        )

    def _output_finished(self) -> bool:
        return all(
            port.service.finished
            for port in self._ports
            if port.connection is not None and port.service is not self._signal
        )

    def _guest_closed(self) -> bool:
        return self._code.closed and self._signal.finished

    def _wait(self, guard: Guard, limit: Deadline, done: Callable[[], bool]) -> None:
        """Serve until it is done. Raises what ends a session before its return code."""
        vanished_ns = FOREVER_NS
        while not done():
            self._forward()
            if self._signal.gone and vanished_ns == FOREVER_NS:
                vanished_ns = Deadline.after(self.timeouts.drain).ns
            guard.wait.deadline_ns = min(limit.ns, self._stop_ns, vanished_ns)
            code = self._loop.run_once(guard)
            if code in (errno.ECANCELED, errno.EOWNERDEAD, errno.ETIME):
                self._slurp()
            if code == errno.ECANCELED:
                self._end(code)
            if code == errno.EOWNERDEAD and not done():
                self._end(code)
            if code == errno.ETIME and not done():
                self._expire(min(limit.ns, self._stop_ns), vanished_ns)

    def _expire(self, limit_ns: int, vanished_ns: int) -> NoReturn:
        if vanished_ns < limit_ns:
            raise EnclaveDiedError(
                "the guest closed its signal connection and reported no return code",
                errno=errno.EOWNERDEAD,
                stage=self._stage,
            )
        raise self._overdue(Stage.STOP if self._stop_ns == limit_ns else self._stage)

    def _overdue(self, stage: Stage) -> SessionTimeoutError:
        what = {
            Stage.SERVICES: f"the guest did not connect to {self._missing()}",
            Stage.RUN: "the program has not ended",
            Stage.STOP: "the program has not ended after SIGTERM",
        }[stage]
        return SessionTimeoutError(
            f"the deadline passed: {what}", errno=errno.ETIMEDOUT, stage=stage
        )

    def _missing(self) -> str:
        return ", ".join(
            str(port.listener.address)
            for port in self._ports
            if port.listener and not port.connection and port.service is not self._code
        )

    def _end(self, code: int) -> NoReturn:
        error = from_errno(code, self._stage)
        error.message += f" (stage {self._stage})"
        raise error

    def _begin_to_stop(self) -> None:
        if self._stop_ns == FOREVER_NS and self.timeouts.stop is not None:
            self._stop_ns = Deadline.after(self.timeouts.stop).ns

    def _forward(self) -> None:
        """Write the signals that `terminate` asked for."""
        while self._forwarded < len(self._asked):
            self._begin_to_stop()
            self._forwarded += 1
            self._signal.send()

    def _slurp(self) -> None:
        """Take what has come already, so that the last lines are the last."""
        for _ in range(_SLURPS):
            try:
                if not self._loop.poll():
                    return
            except NitroVsockError as error:  # why the session ends is known already
                logger.debug("at the end of the session for CID %d: %s", self.cid, error)

    def _outputs(self) -> list[OutputService]:
        return [p.service for p in self._ports if isinstance(p.service, OutputService)]

    def _is_blocked(self) -> bool:
        return any(service.blocked for service in self._outputs())

    def _drain(self, guard: Guard, done: Callable[[], bool]) -> bool:
        """Serve until it is done, or until the guest had its time; return whether it is done.

        Time in which an output's own target took nothing is not the guest's; and what has come is
        delivered, however long that takes: it would be lost. Only `SessionTimeouts.stop` ends that.
        """
        began = time.monotonic_ns()
        drain = Deadline.after(self.timeouts.drain).ns - began
        limit = began + (0 if self._is_dead else drain)
        over = False
        while not done() and not (over and not self._is_blocked()):
            self._forward()
            # A program that ended just before the deadline for that has its drain all the same.
            stop = max(self._stop_ns, began + drain)
            since = time.monotonic_ns()
            blocked = self._is_blocked()
            guard.wait.deadline_ns = min(FOREVER_NS if blocked else limit, stop)
            code = self._loop.run_once(guard)
            if blocked:
                limit += time.monotonic_ns() - since
            if code == errno.ECANCELED:
                self._end(code)
            if code == errno.EOWNERDEAD:
                self._is_dead = True
                guard.wait.watch_fd, limit = -1, 0
            if code == errno.ETIME:
                if time.monotonic_ns() >= stop and self._is_blocked():
                    break
                self._slurp()
                over = True
        return done()

    def _hang_up(self) -> None:
        """Close every connection; the session is over."""
        self._loop.close()
        for port in self._ports:
            try:
                port.close()
            except Exception as error:  # whatever ended the session comes first
                logger.warning("a proxy could not be closed: %s", error)
        self._launch.close()

    def _release(self) -> None:
        self._hang_up()
        self._nudge.close()
        self._wake_up.close()

    def __repr__(self) -> str:
        return f"<EnclaveSession for CID {self.cid}, stage {self._stage}>"
