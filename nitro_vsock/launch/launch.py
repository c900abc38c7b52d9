"""Owns: one launch: the order of things from listening to the end of the stream.

Must not know: how arguments are checked, how bytes move, what errno values mean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from nitro_vsock import protocol
from nitro_vsock.core import Guard
from nitro_vsock.deadline import DEFAULT_TIMEOUT, Deadline, Timeout
from nitro_vsock.errors import ClosedError, NitroVsockError, SourceError, Stage, VsockBindError
from nitro_vsock.launch.ports import bind_hint, check_enclave_fd
from nitro_vsock.launch.report import LaunchReport, Phases
from nitro_vsock.progress import Meter, Progress
from nitro_vsock.rootfs import OpenRootfs
from nitro_vsock.transport import Address, FilePayload, Holder, Listener, Strategy, Stream, WakeUp
from nitro_vsock.wire import EnclaveArg, Finished, RootFilesystem, encode_packets

logger = logging.getLogger("nitro_vsock")

SMALL_ROOTFS: Final = 60 << 10
"""Bytes of an archive that is sent together with the arguments: all of it fits one 64 KiB packet of
AF_VSOCK, whose first 4 KiB hold every length."""

_FINISHED: Final = Finished().encode()


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
        args: Sequence[EnclaveArg],
        source: OpenRootfs,
        cid: int,
        address: Address,
        peer_cid: int | None,
        strict_peer: bool,
        strategy: Strategy,
    ) -> None:
        """For `EnclaveArgsWriter.listen`."""
        self._closing = True
        self._opening = _Opening(args, source, strategy)
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
        phases = Phases()
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
