"""Owns: a relay between two ends, all driven by one thread, so that every order of events is ours.

Must not know: what a test wants to see.
"""

import contextlib
import errno
import socket
import time

from nitro_vsock.core.calls import FOREVER_NS, Guard
from nitro_vsock.core.relays import FlowState
from nitro_vsock.deadline import Deadline
from nitro_vsock.transport.loop import EventLoop

ENDED = (FlowState.ENDED, FlowState.ENDED)


class End:
    """The far end of a relayed socket."""

    def __init__(self, sock):
        self.sock = sock
        self.sock.setblocking(False)
        self.unsent = b""
        self.sent = 0
        self.got = bytearray()
        self.ended = False
        self.shut = False

    def send(self, data=b""):
        """Send what is due and `data`, as far as it goes."""
        self.unsent += data
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                count = self.sock.send(self.unsent, socket.MSG_NOSIGNAL)
                self.sent += count
                self.unsent = self.unsent[count:]

    def receive(self, most=1 << 30):
        """Take what is there, `most` bytes at most."""
        with contextlib.suppress(BlockingIOError):
            while most > 0 and not self.ended:
                data = self.sock.recv(min(most, 1 << 17))
                self.ended = not data
                self.got += data
                most -= len(data)

    def fill(self):
        """Send until nothing more goes; return how much that was."""
        before = self.sent
        self.send(bytes(16 << 20))
        self.unsent = b""
        return self.sent - before


class Relayed:
    """`one` and `other` with a relay between them. A context manager."""

    def __init__(self, loop=None, **options):
        self.loop = loop or EventLoop()
        pairs = [socket.socketpair(), socket.socketpair()]
        self.one, self.other = End(pairs[0][0]), End(pairs[1][0])
        self.relayed = [pair[1] for pair in pairs]
        self.calls = 0
        self.relay = self.loop.relay(*self.relayed, self._on_end, **options)

    def _on_end(self, _relay):
        self.calls += 1

    @property
    def states(self):
        """Of both directions."""
        return self.relay.there.state, self.relay.back.state

    def pump(self, rounds=1):
        """Let the relay do what it can at the moment."""
        for _ in range(rounds):
            self.loop.poll()

    def settle(self, until, seconds=10.0):
        """Move everything that is due until it is so."""
        give_up = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < give_up, (self.states, self.one.sent, len(self.other.got))
            ends = [end for end in (self.one, self.other) if end.sock.fileno() >= 0]
            for end in ends:
                with contextlib.suppress(ConnectionError):
                    end.send()
            self.pump()
            for end in ends:
                with contextlib.suppress(ConnectionError):
                    end.receive()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.loop.close()
        for sock in (self.one.sock, self.other.sock, *self.relayed):
            sock.close()


def guard(seconds=None, cancel_fd=-1):
    """Return what ends a wait: a deadline and a cancel descriptor, and no tick."""
    made = Guard(Deadline(FOREVER_NS) if seconds is None else Deadline.after(seconds), cancel_fd)
    made.wait.tick_ns = FOREVER_NS
    return made


def processor_share(loop, seconds=0.4):
    """Let a loop wait for a while; return the share of a processor that it took for that."""
    limit = guard(seconds)
    began, used = time.monotonic(), time.thread_time()
    while loop.run_once(limit) != errno.ETIME:
        pass
    return (time.thread_time() - used) / (time.monotonic() - began)
