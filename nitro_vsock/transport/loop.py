"""Owns: one thread's waiting for many descriptors: who is called when, what flows between two.

Must not know: what a descriptor is for.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from nitro_vsock.core import FOREVER_NS, VERDICTS, Flow, FlowState, Guard, Pump, sockets
from nitro_vsock.deadline import Deadline
from nitro_vsock.errors import NitroVsockError

PIPE_BYTES: Final = 256 << 10
"""Asked of the pipe of a spliced flow; less where the user has many pipes (pipe(7))."""

SOCKET_BUFFER: Final = 1 << 20
"""Bytes asked of SO_SNDBUF of Unix sockets that are relayed: what one splice can hand over."""


class EventLoop:
    """Calls back for descriptors that are ready. One thread uses it at a time.

    Nothing wakes it but events: while nothing happens it makes no system call.
    """

    def __init__(self) -> None:
        self._watched: dict[int, tuple[int, Callable[[int], object]]] = {}
        self._order: list[tuple[int, tuple[int, Callable[[int], object]]]] = []
        self._relays: list[Relay] = []
        self._pump = Pump()
        self._stale = False

    def watch(self, fd: int, events: int, callback: Callable[[int], object]) -> None:
        """Call `callback(revents)` whenever a descriptor is ready, until `unwatch`.

        Args:
            fd: borrowed; unwatch it before it is closed. Watching it again replaces the entry.
            events: select.POLLIN, select.POLLOUT; hang-up and error are always reported.
            callback: in the loop's thread; must not block. What it raises leaves `run_once`.
        """
        self._watched[fd] = (events, callback)
        self._stale = True

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor; one that is not watched is no error."""
        self._stale |= self._watched.pop(fd, None) is not None

    def relay(
        self,
        one: socket.socket,
        other: socket.socket,
        on_end: Callable[[Relay], object],
        *,
        whole_frames: int = 0,
    ) -> Relay:
        """Let bytes flow between two stream sockets, both ways, in order and unchanged.

        Where one side ends, the other is shut down for writing once it has everything.

        Args:
            one: borrowed, and made non-blocking.
            other: the same.
            on_end: called when a direction has ended or failed, in the loop's thread.
            whole_frames: where not 0, the first socket sends frames, each after its length as a
                big-endian u32, of so many bytes at most; they are handed on whole, copied, for
                those who cannot bear a frame in pieces. A longer one fails with EMSGSIZE.
        """
        relay = Relay(self, one, other, on_end, whole_frames)
        self._relays.append(relay)
        self._stale = True
        return relay

    def _forget(self, relay: Relay) -> None:
        if relay in self._relays:
            self._relays.remove(relay)
            self._stale = True

    def run_once(self, guard: Guard) -> int:
        """Wait for events and call back.

        Returns:
            0, or the errno value of the guard's verdict. EINTR: a signal handler may have run.

        Raises:
            NitroVsockError: the kernel does not let us wait.
            Exception: what a callback raised.
        """
        if self._stale:
            self._order = list(self._watched.items())
            self._pump.prepare(
                [(fd, entry[0]) for fd, entry in self._order],
                [flow for relay in self._relays for flow in (relay.there, relay.back)],
            )
            self._stale = False
        code, events = self._pump.wait(guard)
        if code and code not in VERDICTS:
            raise NitroVsockError(f"waiting failed: {os.strerror(code)}", errno=code)
        order = self._order
        for index, revents in events:
            fd, entry = order[index]
            # An earlier callback may have unwatched it, and its number may be another's by now.
            if self._watched.get(fd) is entry:
                entry[1](revents)
        for relay in list(self._relays):
            relay.look()
        if code == 0 and time.monotonic_ns() >= guard.wait.deadline_ns:
            return errno.ETIME  # where something is always ready, the core never says so
        return code

    def poll(self) -> bool:
        """Call back for what is ready now, without waiting; return whether anything was."""
        guard = Guard(Deadline(FOREVER_NS))
        return self.run_once(guard) == 0  # its first tick is due at once

    def close(self) -> None:
        """Forget everything; the pipes of relays are closed."""
        for relay in list(self._relays):
            relay.close()
        self._watched.clear()
        self._stale = True


class Relay:
    """Two directions between two sockets. Made by `EventLoop.relay`.

    Attributes:
        there: the direction from the first socket to the second.
        back: the other one.
    """

    def __init__(
        self,
        loop: EventLoop,
        one: socket.socket,
        other: socket.socket,
        on_end: Callable[[Relay], object],
        whole_frames: int,
    ) -> None:
        self._loop = loop
        self._on_end = on_end
        self._pipes: list[tuple[int, int]] = []
        for sock in (one, other):
            sock.setblocking(False)
            if sock.family == socket.AF_UNIX:
                sockets.enlarge_sndbuf(sock.fileno(), SOCKET_BUFFER)
        pipe = None if whole_frames else self._pipe(one)
        self.there = Flow(one.fileno(), other.fileno(), pipe, whole_frames)
        self.back = Flow(other.fileno(), one.fileno(), self._pipe(other))
        self._seen = (FlowState.OPEN, FlowState.OPEN)

    def _pipe(self, source: socket.socket) -> tuple[int, int] | None:
        """Return a pipe where the kernel hands over pages; AF_VSOCK copies into the pipe too."""
        if source.family != socket.AF_UNIX:
            return None
        try:
            pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # for want of descriptors: copying needs none
            return None
        self._pipes.append(pipe)
        with suppress(OSError):
            fcntl.fcntl(pipe[1], _F_SETPIPE_SZ, PIPE_BYTES)
        return pipe

    def look(self) -> None:
        """Call `on_end` where a direction is not open any more and was the last time."""
        states = (self.there.state, self.back.state)
        if states != self._seen:
            self._seen = states
            self._on_end(self)

    def close(self) -> None:
        """Stop; any number of times. The sockets stay open."""
        self._loop._forget(self)
        pipes, self._pipes = self._pipes, []
        for pipe in pipes:
            for fd in pipe:
                os.close(fd)


_F_SETPIPE_SZ: Final = 1031
"""`linux/fcntl.h`; the fcntl module has it from Python 3.10 on where its headers did."""

READABLE: Final = select.POLLIN

WRITABLE: Final = select.POLLOUT
