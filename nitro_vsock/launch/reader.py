"""Owns: the guest's side of a launch, for emulators and tests: connect, decode, store, digest.

Must not know: how frames are decoded, how bytes move.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from nitro_vsock import protocol
from nitro_vsock.archive import TarChecker
from nitro_vsock.check import check_strings
from nitro_vsock.core import Guard
from nitro_vsock.deadline import DEFAULT_TIMEOUT, Deadline, Timeout
from nitro_vsock.errors import ClosedError, GuestRuleError, ProtocolError, Stage, require_int
from nitro_vsock.launch.ports import service_address
from nitro_vsock.progress import Meter, Progress
from nitro_vsock.rootfs import Sink, open_sink
from nitro_vsock.transport import (
    Holder,
    PathLike,
    Stream,
    UnixAddress,
    VsockAddress,
    WakeUp,
    connect,
)
from nitro_vsock.wire import (
    DEFAULT_LIMITS,
    AppOutput,
    EnclaveArg,
    Event,
    ExecArgv,
    ExecEnvp,
    ExecPath,
    FrameDecoder,
    Limits,
    NetworkProxy,
    RootFilesystem,
    RootfsData,
)

BUFFER: Final = 1 << 20
"""Bytes received at once; the reader's memory does not grow beyond it."""


@dataclass(frozen=True)
class EnclaveArgs:
    """What a launch handed over.

    Strings are UTF-8 with surrogates standing for other bytes (PEP 383).

    Attributes:
        exec_path: the program's path.
        argv: its arguments.
        envp: its environment.
        network_proxy: whether the guest is to connect to the network service.
        app_output: whether it is to send the program's output.
        rootfs_length: bytes of the root file system.
        rootfs_sha256: their digest, in hex.
        frames: names of the frames in the order they came.
        bytes_received: of the whole stream.
        seconds: from the first frame to Finished.
    """

    exec_path: str
    argv: tuple[str, ...]
    envp: tuple[str, ...]
    network_proxy: bool
    app_output: bool
    rootfs_length: int
    rootfs_sha256: str
    frames: tuple[str, ...]
    bytes_received: int
    seconds: float


class EnclaveArgsReader(Holder):
    """Takes one launch as the guest does.

    `cancel` and `close` may be called from any thread and from signal handlers.
    """

    def __init__(
        self,
        cid: int,
        *,
        uds_path: PathLike | None = None,
        host_cid: int = protocol.VMADDR_CID_HOST,
        limits: Limits = DEFAULT_LIMITS,
        strict: bool = False,
    ) -> None:
        """Check the arguments; nothing is connected yet.

        Args:
            cid: of the enclave this stands for; the port is CID + 1.
            uds_path: base path of a hybrid vsock, in place of AF_VSOCK.
            host_cid: where to connect: 2 from a guest, 1 or 2 over vsock loopback.
            limits: checked before anything is allocated.
            strict: also enforce what the real guest needs (docs/protocol.md): a length arrives
                whole for one read, strings fit the NSM, the rootfs is a tar it can unpack.

        Raises:
            InvalidArgumentError: names the field, the value and the limit.
        """
        self._closing = True
        address = service_address(cid, protocol.VsockPortOffset.ARGS_READER, uds_path)
        if isinstance(address, VsockAddress):
            require_int("host_cid", host_cid, 0, protocol.VMADDR_CID_ANY - 1)
            address = VsockAddress(host_cid, address.port)
        super().__init__(WakeUp())
        self.address: VsockAddress | UnixAddress = address
        self._limits = limits
        self._strict = strict
        self._spent = False

    def cancel(self) -> None:
        """End a running `read_args`, or the next one, with LaunchCancelledError."""
        self._wake_up.set()

    def _at(self, step: str, args: EnclaveArgs | None = None) -> None:
        """Do nothing; for emulators: called at "connect", "handshake", "arguments", "finished"."""

    def read_args(
        self,
        rootfs: Sink = None,
        timeout: Timeout = DEFAULT_TIMEOUT,
        progress: Callable[[Progress], object] | None = None,
    ) -> EnclaveArgs:
        """Connect, take the launch, close. Once per reader.

        Args:
            rootfs: where the root file system goes. A path appears only when everything is there,
                complete; a descriptor is written from its offset on; a callback gets memoryviews
                that are valid during the call.
            timeout: seconds or PollTimeout for all of it.
            progress: called with a Progress about ten times a second and at the end.

        Raises:
            VsockConnectError, ConnectTimeoutError, UnsupportedError: no connection.
            ReadySignalNotDetectedError: the host's first byte is not 0xb7.
            ProtocolError: a subclass says what is wrong with the bytes.
            PeerClosedError, VsockReadError, StreamTimeoutError: the stream broke off.
            LaunchCancelledError, ClosedError, BusyError: as their names say.
            InvalidArgumentError: a timeout, rootfs or progress that is none, before connecting.
            OSError: the rootfs could not be stored.
        """
        deadline = Deadline.after(timeout)
        with self._in_use():
            if self._spent:
                raise ClosedError("this EnclaveArgsReader has been used")
            self._spent = True
            guard = Guard(deadline, self._wake_up.fileno())
            meter = Meter(progress)
            # A sink that cannot be opened must not cost the launch its one connection.
            with open_sink(rootfs) as store:
                self._at("connect")
                with connect(self.address, guard, self._wake_up) as stream:
                    self._at("handshake")
                    stream.handshake(protocol.READY, guard)
                    self._at("arguments")
                    args = self._read(stream, guard, meter, store)
                    self._at("finished", args)
                    return args

    def _read(
        self, stream: Stream, guard: Guard, meter: Meter, store: Callable[[memoryview], object]
    ) -> EnclaveArgs:
        decoder = FrameDecoder(self._limits)
        result = _Collector(store, TarChecker() if self._strict else None)
        buffer = memoryview(bytearray(BUFFER))
        began = time.monotonic()
        meter.begin(Stage.READ)
        try:
            while not decoder.finished:
                # The strict reader reads as the guest does: each field with a read of its own.
                want = min(decoder.need, BUFFER) if self._strict else BUFFER
                in_length = self._strict and decoder.in_length
                count = stream.receive(buffer[:want], guard, meter)
                meter.done += count
                if count == 0:
                    decoder.end()
                if in_length and count < want:
                    raise GuestRuleError(
                        f"a length came in pieces, the first of {count} bytes: the guest takes it "
                        "with one read"
                    )
                for event in decoder.feed(buffer[:count]):
                    result.take(event)
                    if isinstance(event, RootFilesystem):
                        meter.total = decoder.taken + event.length + 1  # Finished
                meter.tick()
            if self._strict:
                result.check()
        except ProtocolError as error:
            error.stage, error.bytes_sent = Stage.READ, meter.done
            raise
        meter.done -= decoder.trailing
        meter.total = meter.done
        meter.tick(last=True)
        return result.args(decoder, meter.done, time.monotonic() - began)

    def _release(self) -> None:
        self._wake_up.close()

    def __repr__(self) -> str:
        return f"<EnclaveArgsReader at {self.address}>"


class _Collector:
    """Gathers a decoder's events."""

    def __init__(self, store: Callable[[memoryview], object], tar: TarChecker | None) -> None:
        self._store = store
        self._tar = tar
        self._digest = hashlib.sha256()
        self._args: dict[type[EnclaveArg], EnclaveArg] = {}

    def take(self, event: Event) -> None:
        if isinstance(event, RootfsData):
            self._digest.update(event.data)
            if self._tar is not None:
                self._tar.feed(event.data)
            self._store(event.data)
        else:
            self._args[type(event)] = event

    def check(self) -> None:
        """Enforce what the real guest needs of the whole."""
        if self._tar is not None:
            self._tar.finish()
        check_strings(self._get(ExecPath), self._get(ExecArgv), self._get(ExecEnvp))

    def args(self, decoder: FrameDecoder, received: int, seconds: float) -> EnclaveArgs:
        """Return the result of a decoder that has finished."""
        return EnclaveArgs(
            exec_path=_text(self._get(ExecPath).path),
            argv=tuple(map(_text, self._get(ExecArgv).strings)),
            envp=tuple(map(_text, self._get(ExecEnvp).strings)),
            network_proxy=NetworkProxy in self._args,
            app_output=AppOutput in self._args,
            rootfs_length=self._get(RootFilesystem).length,
            rootfs_sha256=self._digest.hexdigest(),
            frames=tuple(frame.name for frame in decoder.seen),
            bytes_received=received,
            seconds=seconds,
        )

    def _get(self, kind: type[_Arg]) -> _Arg:
        arg = self._args[kind]
        assert isinstance(arg, kind)  # noqa: S101 - keyed by its type
        return arg


_Arg = TypeVar("_Arg", bound=EnclaveArg)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
