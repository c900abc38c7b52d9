"""Owns: the program's output.

Must not know: when a session begins and ends, how descriptors are waited for.
"""

from __future__ import annotations

import logging
import socket

from nitro_vsock.protocol import VsockPortOffset
from nitro_vsock.session.outputs import Output, Tail, Target, open_output
from nitro_vsock.session.services.receiving import CHUNK, receive_into
from nitro_vsock.transport import READABLE, WRITABLE, EventLoop
from nitro_vsock.wire import AppOutput


class OutputProxy:
    """The program's standard output and standard error, one stream as the guest sends it."""

    port_offset = VsockPortOffset.APP_OUTPUT

    def __init__(self, target: Target, *, append: bool = False, level: int = logging.INFO) -> None:
        """Nothing is opened yet.

        Args:
            target: where the output goes:
                a path: created or emptied when a session begins; opening a FIFO that nobody reads
                is an error;
                a descriptor: duplicated, or opened anew where it is a pipe or terminal; bytes
                unchanged;
                an object with `write`: bytes unchanged, or text decoded from UTF-8 where it is a
                text file; flushed after each write; may block, and holds up all proxies meanwhile;
                a callable: gets each line as str, without its end, bytes that are not UTF-8
                escaped; in pieces where it is longer than 64 KiB;
                a `logging.Logger`: a record for each line.
            append: with a path: add to the file.
            level: with a logger: of the records.
        """
        self._target = target
        self._append = append
        self._level = level

    def arg(self) -> AppOutput:
        """Return the frame that makes the guest send it."""
        return AppOutput()

    def open(self) -> OutputService:
        """Open the target.

        Raises:
            InvalidArgumentError: it is none.
            ProxyError: it cannot be opened.
        """
        return OutputService(open_output(self._target, append=self._append, level=self._level))


class OutputService:
    """Output of one session, from the guest's socket to its place, with backpressure."""

    def __init__(self, output: Output) -> None:
        """Take an open place; it is closed with this."""
        self.tail = Tail()
        self.finished = False
        self.received = 0
        self._output = output
        self._buffer = memoryview(bytearray(CHUNK))
        self._waiting = self._buffer[:0]
        self._connection: socket.socket | None = None

    @property
    def blocked(self) -> bool:
        """Whether it waits for its own target, not for the guest."""
        return bool(self._waiting)

    def connected(self, connection: socket.socket, loop: EventLoop) -> None:
        """Receive from now on."""
        self._connection, self._loop = connection, loop
        loop.watch(connection.fileno(), READABLE, self._receive)

    def _receive(self, _events: int) -> None:
        assert self._connection is not None  # noqa: S101 - watched only once connected
        count = receive_into(self._connection, self._buffer)
        if count is None:
            return
        if count == 0:
            self._loop.unwatch(self._connection.fileno())
            self.finished = True
            return
        self.received += count
        self._waiting = self._buffer[:count]
        self.tail.add(self._waiting)
        self._deliver()
        if self._waiting:
            self._loop.unwatch(self._connection.fileno())
            self._loop.watch(self._output.fileno(), WRITABLE, self._go_on)

    def _deliver(self) -> None:
        self._waiting = self._waiting[self._output.write(self._waiting) :]

    def _go_on(self, _events: int) -> None:
        assert self._connection is not None  # noqa: S101
        self._deliver()
        if not self._waiting:
            self._loop.unwatch(self._output.fileno())
            self._loop.watch(self._connection.fileno(), READABLE, self._receive)

    def close(self) -> None:
        """Close the place. Raises ProxyError where it says only now that it could not write."""
        self._output.close()
