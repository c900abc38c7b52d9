"""Owns: the host's side of a launch: validation, the order of things, the report.

Must not know: how frames are built, how bytes move, what errno values mean.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Union

from nitro_vsock import protocol
from nitro_vsock._lib import Guard
from nitro_vsock.deadline import DEFAULT_TIMEOUT, Deadline, Timeout
from nitro_vsock.errors import (
    ClosedError,
    InvalidArgumentError,
    NitroVsockError,
    PreflightError,
    SourceError,
    Stage,
    VsockBindError,
    require_int,
)
from nitro_vsock.frames import (
    AppOutput,
    EnclaveArg,
    ExecArgv,
    ExecEnvp,
    ExecPath,
    Finished,
    NetworkProxy,
    RootFilesystem,
    Text,
    encode_packets,
    encode_text,
    encode_texts,
)
from nitro_vsock.preflight import Finding, Severity, quick_preflight
from nitro_vsock.preflight import preflight as full_preflight
from nitro_vsock.progress import Meter, Progress
from nitro_vsock.proxies import DeviceProxy, DeviceProxyList
from nitro_vsock.sources import OpenRootfs, PathLike, Rootfs
from nitro_vsock.transport import (
    Address,
    FilePayload,
    Holder,
    Listener,
    Peer,
    Strategy,
    Stream,
    UnixAddress,
    VsockAddress,
    WakeUp,
)

logger = logging.getLogger("nitro_vsock")
logger.addHandler(logging.NullHandler())

Environment = Union[Mapping[str, str], Mapping[bytes, bytes], Iterable[Text]]

SMALL_ROOTFS: Final = 60 << 10
"""Bytes of an archive that is sent together with the arguments: all of it fits one 64 KiB packet of
AF_VSOCK, whose first 4 KiB hold every length."""

_PATH: Final = b"PATH="
_FINISHED: Final = Finished().encode()


@dataclass(frozen=True)
class LaunchReport:
    """What a launch did.

    Attributes:
        bytes_sent: bytes of the whole stream, ready byte not counted.
        rootfs_bytes: bytes of the root file system among them.
        strategy: how the root file system was moved in the end; READ where the kernel refused the
            first choice. Of a directory, how its last large file was; SEND where it has none.
        system_calls: calls that moved bytes or tried to.
        seconds: duration of each phase: accept (with the handshake), arguments, rootfs, finish.
        peer: who took it.
        strangers: connections refused, by reason: cid, ready (another first byte), closed (went
            away), crowded (silent while too many waited).
        peer_closed: True: the peer closed its end after Finished had been sent. That shows that it
            ended, not that it read everything: on AF_VSOCK a guest that dies with unread data looks
            the same, so watch the enclave's descriptor. False: it was not waited for.
    """

    bytes_sent: int
    rootfs_bytes: int
    strategy: Strategy
    system_calls: int
    seconds: dict[str, float]
    peer: Peer
    strangers: dict[str, int]
    peer_closed: bool

    @property
    def strangers_refused(self) -> int:
        """Connections refused, together."""
        return sum(self.strangers.values())

    @property
    def throughput(self) -> float:
        """Bytes of the root file system per second, until the peer closed."""
        seconds = self.seconds["rootfs"] + self.seconds["finish"]
        return self.rootfs_bytes / seconds if seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it with plain types only, as JSON wants it."""
        return {
            **dataclasses.asdict(self),
            "strategy": self.strategy.value,
            "throughput": self.throughput,
        }


def service_address(
    cid: int, service: protocol.VsockPortOffset, uds_path: PathLike | None = None
) -> Address:
    """Return where the host listens for a service of the enclave with this CID.

    Args:
        cid: the enclave's.
        service: which.
        uds_path: the base path of a hybrid vsock; a guest's connect to port P arrives at
            `<uds_path>_P` (Firecracker's convention). AF_VSOCK by default.

    Raises:
        InvalidArgumentError: a CID outside MIN_CID to MAX_CID, or a path that gets too long.
    """
    reason = "0, 1 and 2 are reserved, and ports CID + 1 to CID + 5 must exist"
    port = require_int("cid", cid, protocol.MIN_CID, protocol.MAX_CID, reason) + service
    if uds_path is None:
        return VsockAddress(protocol.VMADDR_CID_ANY, port)
    try:
        return UnixAddress(f"{os.fsdecode(uds_path)}_{port}")
    except TypeError:
        raise InvalidArgumentError("uds_path", uds_path, "must be a path") from None


class EnclaveArgsWriter:
    """The configuration of a launch, checked; hands it to enclaves any number of times.

    Attributes:
        rootfs: the root file system.
        args: the other frames, in the order they are sent.
        proxies: those given, for an `EnclaveSession`.
    """

    def __init__(
        self,
        rootfs: Rootfs,
        exec_path: Text,
        argv: Iterable[Text],
        envp: Environment,
        *,
        proxies: Iterable[DeviceProxy] | None = None,
        network_proxy: bool = False,
        app_output: bool = False,
    ) -> None:
        """Check and encode the arguments.

        Args:
            rootfs: see `Rootfs`.
            exec_path: the program's path, measured into PCR17. Up to 4000 bytes.
            argv: at least one string of up to 4000 bytes; argv[0] is what is executed.
            envp: at least one variable: a mapping, or a list of `NAME=value`. Where argv[0] has no
                slash, PATH is put first, because the guest looks nowhere else for it.
            proxies: their frames are added.
            network_proxy: the guest is to connect to the network service.
            app_output: the guest is to send the program's output.

        Raises:
            InvalidArgumentError: names the field, the value and the limit.
        """
        self.proxies = DeviceProxyList(proxies or ())
        argv_bytes = encode_texts("argv", argv)
        envp_bytes = encode_texts("envp", _environment(envp))
        if b"/" not in argv_bytes[0]:
            envp_bytes = _path_first(envp_bytes)
        self._setup(
            rootfs,
            encode_text("exec_path", exec_path),
            argv_bytes,
            envp_bytes,
            [
                *([NetworkProxy()] if network_proxy else []),
                *([AppOutput()] if app_output else []),
                *self.proxies.args(),
            ],
        )

    @classmethod
    def from_reference(
        cls,
        rootfs: Rootfs | bytes,
        exec_path: str,
        argv_str: str,
        envp_str: str,
        proxies: DeviceProxyList,
    ) -> EnclaveArgsWriter:
        """Build what the reference's `EnclaveArgsWriter::new` builds from the same arguments.

        Double quotes are deleted and the strings split at every single space; empty strings stay,
        and the order of envp too, so that PCR17 is the same.

        Args:
            rootfs: a Rootfs, or the archive in memory as the reference takes it.
            exec_path: the program's path.
            argv_str: the arguments in one string.
            envp_str: the environment in one string.
            proxies: their frames are added.

        Raises:
            InvalidArgumentError: names the field, the value and the limit.
        """
        for name, value in (("argv_str", argv_str), ("envp_str", envp_str)):
            if not isinstance(value, str):
                raise InvalidArgumentError(name, value, "must be str")
        writer = cls.__new__(cls)
        writer.proxies = DeviceProxyList(proxies)
        writer._setup(
            rootfs if isinstance(rootfs, Rootfs) else Rootfs.from_bytes(rootfs),
            encode_text("exec_path", exec_path, allow_empty=True),
            encode_texts("argv", argv_str.replace('"', "").split(" "), allow_empty=True),
            encode_texts("envp", envp_str.replace('"', "").split(" "), allow_empty=True),
            writer.proxies.args(),
        )
        return writer

    def _setup(
        self,
        rootfs: Rootfs,
        path: bytes,
        argv: tuple[bytes, ...],
        envp: tuple[bytes, ...],
        flags: list[EnclaveArg],
    ) -> None:
        if not isinstance(rootfs, Rootfs):
            raise InvalidArgumentError("rootfs", rootfs, "must be a Rootfs (Rootfs.from_file, ...)")
        self.rootfs = rootfs
        # Flags first: the guest spins for ever on a stream that ends after one.
        self.args: tuple[EnclaveArg, ...] = (
            *dict.fromkeys(flags),
            ExecPath(path),
            ExecArgv(argv),
            ExecEnvp(envp),
        )
        # To see that they fit. The archive's length takes the same room whatever it is.
        encode_packets([*self.args, RootFilesystem(1)])

    def listen(
        self,
        cid: int,
        *,
        uds_path: PathLike | None = None,
        peer_cid: int | None = None,
        strict_peer: bool = False,
        strategy: Strategy | str = Strategy.AUTO,
        preflight: bool = True,
    ) -> Launch:
        """Bind the arguments port now, before the enclave boots: a guest tries once.

        Args:
            cid: of the enclave that is going to boot; the port is CID + 1. Enclaves need CIDs at
                least 5 apart, and CIDs below 1023 need CAP_NET_BIND_SERVICE.
            uds_path: base path of a hybrid vsock, in place of AF_VSOCK.
            peer_cid: the CID the guest's connection shows; `cid` by default. 1 over vsock loopback,
                VMADDR_CID_ANY for whoever comes.
            strict_peer: fail at the first stranger, as the reference does, instead of refusing it
                and waiting on.
            strategy: how to send the root file system; AUTO takes the fastest.
            preflight: make the quick ones of the checks of `preflight`: the strings, and the first
                header of an archive in a file. Errors are raised, warnings logged.

        Returns:
            A Launch; use it as a context manager.

        Raises:
            InvalidArgumentError: before anything is bound.
            PreflightError: the guest would fail on this launch; before anything is bound.
            SourceReadError: the rootfs cannot be opened.
            VsockBindError: the port is taken or not permitted.
            UnsupportedError: this kernel has no AF_VSOCK.
        """
        address = service_address(cid, protocol.VsockPortOffset.ARGS_READER, uds_path)
        wanted = check_peer_cid(cid if peer_cid is None else peer_cid)
        source = self.rootfs.open()
        try:
            way = _check_strategy(strategy, source)
            if preflight:
                _refuse_errors(quick_preflight(self, source))
            return Launch(self, source, cid, address, wanted, strict_peer, way)
        except BaseException:
            source.close()
            raise

    def preflight(self, memory_bytes: int | None = None) -> tuple[Finding, ...]:
        """Return everything that the guest would fail on, or may, without launching anything.

        The archive is read once, from its start to its end; a pipe is not. docs/rootfs.md has the
        table of codes.

        Args:
            memory_bytes: the enclave's memory; not checked where it is left out.

        Raises:
            InvalidArgumentError: a memory_bytes that is no number of bytes.
        """
        return full_preflight(self, memory_bytes)

    def write_args(
        self,
        cid: int,
        timeout: Timeout = DEFAULT_TIMEOUT,
        *,
        progress: Callable[[Progress], object] | None = None,
        enclave_fd: int | None = None,
        **listen: Any,
    ) -> LaunchReport:
        """Listen, send and close in one call, as the reference does.

        The port is bound only now; where the enclave may boot earlier, use `listen` before it does.

        Args:
            cid: of the enclave.
            timeout: see `Launch.send`.
            progress: see `Launch.send`.
            enclave_fd: see `Launch.send`.
            listen: keyword arguments of `listen`.

        Raises:
            NitroVsockError: as `listen` and `Launch.send` do.
        """
        Deadline.after(timeout)
        with self.listen(cid, **listen) as launch:
            return launch.send(timeout, progress, enclave_fd=enclave_fd)

    def __repr__(self) -> str:
        return f"<EnclaveArgsWriter {self.rootfs!r}>"


def _environment(envp: Environment) -> Iterable[Text]:
    if not isinstance(envp, Mapping):
        return envp
    entries: list[Text] = []
    for name, value in envp.items():
        key = encode_text("envp name", name)
        if b"=" in key:
            raise InvalidArgumentError("envp name", name, "must not contain '='")
        entries.append(key + b"=" + encode_text(f"envp[{name!r}]", value, allow_empty=True))
    return entries


def _path_first(envp: tuple[bytes, ...]) -> tuple[bytes, ...]:
    for index, entry in enumerate(envp):
        if entry.startswith(_PATH):
            return (entry, *envp[:index], *envp[index + 1 :])
    logger.warning("argv[0] has no slash and envp no PATH: the guest will not find the program")
    return envp


def _refuse_errors(findings: tuple[Finding, ...]) -> None:
    for finding in findings:
        if finding.severity is Severity.ERROR:
            limit = f"{finding.reason}; {finding.remedy}"
            raise PreflightError(finding.subject, finding.code, limit, findings)
        logger.warning("%s", finding)


def check_peer_cid(cid: int) -> int | None:
    """Return the CID to admit, None for any.

    Raises:
        InvalidArgumentError: it is no CID.
    """
    require_int("peer_cid", cid, 0, protocol.VMADDR_CID_ANY)
    return None if cid == protocol.VMADDR_CID_ANY else cid


def _check_strategy(strategy: Strategy | str, source: OpenRootfs) -> Strategy:
    try:
        wanted = Strategy(strategy)
    except ValueError:
        names = ", ".join(item.value for item in Strategy)
        raise InvalidArgumentError("strategy", strategy, f"must be one of {names}") from None
    in_memory = isinstance(source.payload, memoryview)
    if wanted is not Strategy.AUTO and in_memory != (wanted is Strategy.SEND):
        fitting = "send" if in_memory else "sendfile, splice, mmap or read"
        limit = f"must be auto, {fitting} for this rootfs"
        raise InvalidArgumentError("strategy", wanted.value, limit)
    return wanted


@dataclass
class _Phases:
    """Durations, in the order they end."""

    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def end(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.since = now - self.since, now


class _Opening:
    """What is ready before the guest connects, so that it need not wait for it to be made.

    Attributes:
        total: bytes of the whole launch, the ready byte apart.
        parts: what is sent from memory before the root file system comes from its source; all there
            is where that is small.
        is_all: whether parts end with Finished.
        data: the answer to the ready byte: its own, and the parts that may travel with it.
    """

    __slots__ = ("data", "is_all", "parts", "total")

    def __init__(self, args: Sequence[EnclaveArg], source: OpenRootfs, strategy: Strategy) -> None:
        """Encode, and read an archive that is small enough to travel in one send with the rest."""
        packets = encode_packets([*args, RootFilesystem(source.length)])
        self.total = sum(map(len, packets)) + source.length + len(_FINISHED)
        self.parts = [(Stage.ARGUMENTS, packet) for packet in packets]
        small = None
        if strategy in (Strategy.AUTO, Strategy.SEND) and len(packets) == 1:
            small = source.read_small(SMALL_ROOTFS)
        self.is_all = bool(small)
        together = self.parts[:1]
        if small:
            self.parts += [(Stage.ROOTFS, small), (Stage.FINISH, _FINISHED)]
            together = self.parts
        self.data = bytes([protocol.READY]) + b"".join(data for _, data in together)


class Launch(Holder):
    """One launch: bound, waiting for its guest. Made by `EnclaveArgsWriter.listen`.

    `cancel` and `close` may be called from any thread and from signal handlers.
    """

    def __init__(
        self,
        writer: EnclaveArgsWriter,
        source: OpenRootfs,
        cid: int,
        address: Address,
        peer_cid: int | None,
        strict_peer: bool,
        strategy: Strategy,
    ) -> None:
        """For `EnclaveArgsWriter.listen`."""
        self._closing = True
        self._opening = _Opening(writer.args, source, strategy)
        wake_up = WakeUp()
        try:
            self._listener = Listener(address, wake_up)
        except BaseException as error:
            wake_up.close()
            if isinstance(error, VsockBindError):
                error.explain(bind_hint(cid, address))
            raise
        super().__init__(wake_up)
        self.cid = cid
        self.address = address
        self._source = source
        self._peer_cid = peer_cid
        self._strict_peer = strict_peer
        self._strategy = strategy
        self._stream: Stream | None = None
        self.meter = Meter()
        """How far `send` is, or was."""
        self._spent = False
        logger.debug("listening at %s for CID %d", address, cid)

    def fileno(self) -> int:
        """The listening descriptor, for a poll of the caller's; -1 once closed."""
        return self._listener.fileno()

    @property
    def rootfs_bytes(self) -> int:
        """Bytes of the root file system that is going to be sent."""
        return self._source.length

    def cancel(self) -> None:
        """End a running `send`, or the next one, with LaunchCancelledError."""
        self._wake_up.set()

    def send(
        self,
        timeout: Timeout = DEFAULT_TIMEOUT,
        progress: Callable[[Progress], object] | None = None,
        *,
        enclave_fd: int | None = None,
        wait_closed: bool = True,
        on_tick: Callable[[], object] | None = None,
    ) -> LaunchReport:
        """Wait for the guest, hand it everything, and see it close. Once per launch.

        Args:
            timeout: seconds or PollTimeout for all of it: accept, handshake, stream, close.
            progress: called with a Progress about ten times a second while the stream runs, and at
                its end. What it raises ends the launch.
            enclave_fd: the enclave's descriptor: a hang-up there ends the launch.
            wait_closed: wait until the guest closes its end, which it does right after Finished.
                Without it, a guest that has stopped reading the last bytes goes unnoticed.
            on_tick: called about 20 times a second while the call waits or sends. What it raises
                ends the launch.

        Returns:
            The report; every byte was taken by the socket, Finished included.

        Raises:
            PollNoEventsError: no guest connected before the deadline.
            HandshakeTimeoutError, StreamTimeoutError: it passed later; bytes_sent says where.
            VsockCidMismatchError, ReadySignalNotDetectedError: a stranger, with strict_peer.
            PeerClosedError, VsockWriteError, VsockReadError, VsockAcceptError: the socket failed.
            SourceTruncatedError, SourceChangedError, SourceReadError: the rootfs's source failed.
            LaunchCancelledError, EnclaveDiedError, ClosedError, BusyError: as their names say.
            InvalidArgumentError: a timeout that is none.

        After an error with `must_terminate_enclave` the guest holds half a launch: end the enclave.
        """
        deadline = Deadline.after(timeout)
        watch_fd = check_enclave_fd(enclave_fd)
        with self._in_use():
            if self._spent:
                raise ClosedError("this Launch has been used; listen again for another")
            self.meter = meter = Meter(progress)
            self._spent = True
            guard = Guard(deadline, self._wake_up.fileno(), watch_fd, on_tick=on_tick)
            try:
                return self._send(guard, meter, wait_closed)
            except NitroVsockError as error:
                logger.debug("launch for CID %d failed: %s", self.cid, error)
                raise
            finally:
                if self._stream is not None:
                    self._stream.close()
                self._source.close()

    def _send(self, guard: Guard, meter: Meter, wait_closed: bool) -> LaunchReport:
        phases = _Phases()
        opening = self._opening
        meter.total = opening.total
        if opening.is_all:
            self._source.verify()
        strategy = Strategy.SEND if isinstance(self._source.payload, memoryview) else Strategy.READ

        self._stream, sent, strangers = self._listener.admit(
            opening.data, self._peer_cid, guard, strict=self._strict_peer
        )
        phases.end("accept")
        logger.debug("%s connected; refused before: %s", self._stream.peer, strangers)

        meter.begin(Stage.ARGUMENTS)
        meter.done, meter.calls = sent - 1, 1
        skip = meter.done
        for stage, data in opening.parts:
            meter.stage = stage
            if skip < len(data):
                self._stream.send(memoryview(data)[skip:], guard, meter)
            skip = max(skip - len(data), 0)
        phases.end("arguments")

        if not opening.is_all:
            meter.stage = Stage.ROOTFS
            strategy = self._send_rootfs(self._stream, guard, meter)
        phases.end("rootfs")
        if not opening.is_all:
            meter.stage = Stage.FINISH
            self._stream.send(_FINISHED, guard, meter)
        meter.stage = Stage.CLOSE
        if wait_closed:
            self._await_close(self._stream, guard, meter)
        phases.end("finish")
        meter.tick(last=True)
        report = LaunchReport(
            bytes_sent=meter.done,
            rootfs_bytes=self._source.length,
            strategy=strategy,
            system_calls=meter.calls,
            seconds=phases.seconds,
            peer=self._stream.peer,
            strangers=strangers,
            peer_closed=wait_closed,
        )
        logger.debug("launch for CID %d done: %s", self.cid, report)
        return report

    def _send_rootfs(self, stream: Stream, guard: Guard, meter: Meter) -> Strategy:
        strategy = Strategy.SEND
        begun = meter.done
        if not isinstance(self._source.payload, memoryview):
            stream.expect(self._source.length)
        try:
            for piece in self._source.pieces():
                if isinstance(piece, FilePayload):
                    strategy = stream.send_from(piece, self._strategy, guard, meter)
                else:
                    stream.send(piece, guard, meter)
            self._source.verify()
        except SourceError as error:
            error.bytes_sent, error.total = meter.done, meter.total
            error.offset = meter.done - begun
            error.explain(f"{self._source.where}, at offset {error.offset}")
            raise
        return strategy

    def _await_close(self, stream: Stream, guard: Guard, meter: Meter) -> None:
        """Read until the guest's end of stream; what it says after Finished has no meaning."""
        scrap = memoryview(bytearray(64))
        while stream.receive(scrap, guard, meter):
            logger.debug("the guest sent bytes after Finished")

    def _release(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._listener.close()
        self._source.close()
        self._wake_up.close()

    def __repr__(self) -> str:
        return f"<Launch for CID {self.cid} at {self.address}>"


def check_enclave_fd(fd: int | None) -> int:
    """Return what to watch, -1 for None; to the core a closed one would look like a dead enclave.

    Raises:
        InvalidArgumentError: it is no open descriptor.
    """
    if fd is None:
        return -1
    require_int("enclave_fd", fd, 0, (1 << 31) - 1)
    try:
        os.fstat(fd)
    except OSError as error:
        limit = f"must be an open descriptor ({error.strerror})"
        raise InvalidArgumentError("enclave_fd", fd, limit) from None
    return fd


def bind_hint(cid: int, address: Address) -> str:
    """Return what may be the matter where an address of an enclave cannot be bound."""
    if isinstance(address, UnixAddress):
        return (
            f"for an enclave of CID {cid}; a process listens there, or the file is no socket: "
            "what a killed process left is replaced"
        )
    sharing = ", ".join(
        f"{service.name.lower().replace('_', ' ')} of CID {address.port - service}"
        for service in protocol.VsockPortOffset
        if service is not protocol.VsockPortOffset.CONSOLE
    )
    return (
        f"port {address.port} is {sharing}: enclaves need CIDs at least 5 apart; and ports up to "
        "1023 need CAP_NET_BIND_SERVICE"
    )
