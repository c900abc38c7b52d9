"""Owns: signals for the program.

Must not know: when a session begins and ends, how descriptors are waited for.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterable

from nitro_vsock.errors import InvalidArgumentError
from nitro_vsock.protocol import VsockPortOffset
from nitro_vsock.session.services.receiving import INT
from nitro_vsock.transport import READABLE, WRITABLE, EventLoop


class SignalHandler:
    """Signals for the program. The guest acts on SIGTERM only, so that is what is written."""

    port_offset = VsockPortOffset.SIGNAL_HANDLER

    def __init__(self, signals: Iterable[int] = (signal.SIGTERM,)) -> None:
        """Nothing is changed yet.

        Args:
            signals: of this process; while a session runs from the main thread, each of them is
                passed on as SIGTERM in place of the program's own handler, which comes back
                afterwards. Empty: only `EnclaveSession.terminate` sends one.

        Raises:
            InvalidArgumentError: no signal, or one that cannot be handled.
        """
        try:
            self.signals: tuple[int, ...] = tuple(signals)
        except TypeError:
            raise InvalidArgumentError("signals", signals, "must be a list of signals") from None
        usable = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
        for number in self.signals:
            if not isinstance(number, int) or number not in usable:
                raise InvalidArgumentError("signals", number, "must be signals with a handler")

    def arg(self) -> None:
        """Return None: the guest connects always."""

    def open(self) -> SignalService:
        """Return the service of one session."""
        return SignalService()


class SignalService:
    """The signal connection of one session, kept open until the guest closes it.

    The guest would read our end of file as SIGTERM, again and again.
    """

    def __init__(self) -> None:
        self.gone = False
        """The guest has closed its end."""
        self.written = 0
        """Signals written."""
        self._unsent = b""
        self._sent = 0
        self._connection: socket.socket | None = None

    @property
    def finished(self) -> bool:
        """Whether the guest has closed."""
        return self.gone or self._connection is None

    def connected(self, connection: socket.socket, loop: EventLoop) -> None:
        """Write what is due, and wait for the guest's end."""
        self._connection, self._loop = connection, loop
        self._watch()
        self._write()

    def _watch(self) -> None:
        assert self._connection is not None  # noqa: S101
        events = READABLE | (WRITABLE if self._unsent else 0)
        self._loop.watch(self._connection.fileno(), events, self._look)

    def _look(self, events: int) -> None:
        assert self._connection is not None  # noqa: S101
        if events & WRITABLE:
            self._write()
        if events & ~WRITABLE:
            try:
                self.gone = not self._connection.recv(64)
            except BlockingIOError:
                return
            except OSError:
                self.gone = True
        if self.gone:
            self._loop.unwatch(self._connection.fileno())

    def send(self) -> None:
        """Write one SIGTERM, now or as soon as the guest is connected."""
        self._unsent += INT.pack(signal.SIGTERM)
        if self._connection is not None and not self.gone:
            self._write()

    def _write(self) -> None:
        assert self._connection is not None  # noqa: S101
        had = bool(self._unsent)
        try:
            sent = self._connection.send(self._unsent, socket.MSG_NOSIGNAL) if had else 0
        except BlockingIOError:
            sent = 0
        except OSError:  # it is closing: nothing is left to be ended
            sent, self._unsent = 0, b""
        self._unsent = self._unsent[sent:]
        self._sent += sent
        self.written = self._sent // INT.size
        if had and not self.gone:
            self._watch()

    def close(self) -> None:
        """Nothing of its own is open."""
