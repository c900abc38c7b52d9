"""Owns: a guest of its own for sessions: everything it does after a launch, over plain sockets.

Must not know: anything of nitro_vsock. It connects for its arguments, takes them, closes; connects
to output, network and signals; runs; connects to the return code, says the wait status, waits for
four bytes, and is gone. At each named point it can be stopped, or die.
"""

import contextlib
import json
import select
import socket
import struct
import sys
import threading
import time

from peer import GuestError, Parser, connect, handshake

INT = struct.Struct("=i")
FRAME = struct.Struct(">I")

LOOPBACK = 1
NET, OUTPUT, CODE, SIGNAL = 2, 3, 4, 5

POINTS = (
    "connect",  # before it connects for its arguments
    "handshake",  # connected, nothing said
    "arguments",  # ready bytes exchanged, nothing read
    "rootfs",  # in the middle of the archive
    "finished",  # everything read, still connected
    "closed",  # its arguments' connection is closed, nothing else connected
    "output",  # connected to the output
    "net",  # connected to the network, MTU not said
    "mtu",  # MTU said
    "signal",  # connected to the signals
    "running",  # the program has begun
    "said",  # it has written its output
    "ended",  # the program has ended, its output is closed
    "code",  # connected to the return code, nothing said
    "half",  # two bytes of the status said
    "status",  # all of it
    "answered",  # the host's four bytes read
)

BEFORE_FINISHED = POINTS[: POINTS.index("finished")]
AFTER_FINISHED = POINTS[POINTS.index("closed") :]


class DiedError(Exception):
    """The guest dies here; everything it has is closed."""


def die(guest):
    """A hook: the guest is gone from one moment to the next."""
    raise DiedError


def stall(guest):
    """A hook: do nothing more until `let_go`."""
    guest.released.wait(60)


def write_pattern(guest, size):
    """A program: `size` bytes of output, a whole number of MiB, in which no two MiB are alike."""
    block = bytearray(range(256)) * 4096
    for number in range(size >> 20):
        block[:8] = number.to_bytes(8, "big")
        guest.output.sendall(block)


def is_pattern(number, block):
    """Whether a MiB is what `write_pattern` wrote as its n-th."""
    return bytes(block[:8]) == number.to_bytes(8, "big") and bytes(block[8:]) == _REST


_REST = (bytes(range(256)) * 4096)[8:]


class SessionGuest(threading.Thread):
    """A guest in a thread."""

    def __init__(
        self,
        base,
        cid,
        *,
        at=None,
        says=b"",
        program=None,
        status=0,
        mtu=65520,
        header=None,
        keeps=(),
        patient=False,
    ):
        """Start it.

        Args:
            base: of a hybrid vsock's Unix sockets; None: AF_VSOCK over loopback.
            cid: its own.
            at: {point: hook}, see POINTS; a hook is called with this guest.
            says: output of the program.
            program: called with this guest in place of saying something.
            status: what it reports: an int, or bytes.
            mtu: what it says to the network.
            header: bytes it says in place of that.
            keeps: of "output", "net", "signal": what it does not close before the return code.
            patient: try to connect for the arguments until somebody listens.
        """
        super().__init__(daemon=True)
        self._base = base
        self._cid = cid
        self._at = at or {}
        self._says = says
        self._program = program
        self._status = status if isinstance(status, bytes) else INT.pack(status)
        self._header = FRAME.pack(mtu + 14) if header is None else header
        self._keeps = keeps
        self._patient = patient
        self._stack = contextlib.ExitStack()
        self.reached = {point: threading.Event() for point in POINTS}
        self.released = threading.Event()
        self.args = self.output = self.net = self.signal = self.code = None
        self.taken = None
        self.answer = None
        self.signals = []
        self.moments = {}
        self.died = False
        self._error = None
        self.start()

    def address(self, offset):
        """Where it connects."""
        port = self._cid + offset
        return (LOOPBACK, port) if self._base is None else f"{self._base}_{port}"

    def _point(self, name):
        self.moments[name] = time.monotonic()
        self.reached[name].set()
        if name in self._at:
            self._at[name](self)

    def _connect(self, offset):
        sock = self._stack.enter_context(connect(self.address(offset)))
        sock.settimeout(60)
        return sock

    def _connect_patiently(self, offset):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                return self._connect(offset)
            time.sleep(0.0002)
        raise GuestError("nobody listens")

    def run(self):
        """Be the guest."""
        try:
            with self._stack:
                self._launch()
                self._services()
                self._end()
        except DiedError:
            self.died = True
        except BaseException as error:
            self._error = error

    def _launch(self):
        self._point("connect")
        self.args = (self._connect_patiently if self._patient else self._connect)(1)
        self._point("handshake")
        handshake(self.args)
        self._point("arguments")
        first = iter([True])
        sink = lambda _: next(first, False) and self._point("rootfs")  # noqa: E731
        self.taken = Parser(self.args, sink=sink).run()
        self._point("finished")
        self.args.close()
        self._point("closed")

    def _services(self):
        if self.taken.output:
            self.output = self._connect(OUTPUT)
        self._point("output")
        if self.taken.network:
            self.net = self._connect(NET)
            self._point("net")
            self.net.sendall(self._header)
        self._point("mtu")
        self.signal = self._connect(SIGNAL)
        self._point("signal")

    def _end(self):
        self._point("running")
        if self._program is not None:
            self._program(self)
        elif self._says:
            self.output.sendall(self._says)
        self._point("said")
        for name in ("output", "net"):
            if name not in self._keeps and getattr(self, name):
                getattr(self, name).close()
        self._point("ended")
        self.take_signals()
        if "signal" not in self._keeps:
            self.signal.close()
        self.code = self._connect(CODE)
        self._point("code")
        if self._status[:2]:
            self.code.sendall(self._status[:2])
        self._point("half")
        self.code.sendall(self._status[2:])
        self._point("status")
        self.answer = self.code.recv(4, socket.MSG_WAITALL)
        self._point("answered")
        if "signal" in self._keeps:
            self.take_signals()

    def take_signals(self):
        """Read the signals that have come."""
        while select.select([self.signal], [], [], 0)[0]:
            data = self.signal.recv(INT.size, socket.MSG_WAITALL)
            if not data:
                break
            self.signals.append(INT.unpack(data)[0])

    def wait_for_signal(self, timeout=20.0):
        """Wait for a signal, and return it."""
        self.signal.settimeout(timeout)
        data = self.signal.recv(INT.size, socket.MSG_WAITALL)
        if len(data) < INT.size:
            raise GuestError("the host closed the signal connection")
        self.signals.append(INT.unpack(data)[0])
        return self.signals[-1]

    def let_go(self):
        """End a stall."""
        self.released.set()

    def result(self):
        """Wait for the end; return this guest, or raise what went wrong."""
        self.let_go()
        self.join(60)
        assert not self.is_alive(), "the guest hangs"
        if self._error is not None:
            raise self._error
        return self

    def finish(self):
        """Wait for the end, however it came; return what went wrong, or None."""
        self.let_go()
        self.join(60)
        assert not self.is_alive(), "the guest hangs"
        return self._error


def until_terminated(guest):
    """A program that runs until SIGTERM."""
    guest.wait_for_signal()


def main():
    """Be one guest after another: BASE CID ROUNDS; BASE "" is AF_VSOCK. Prints what came of it."""
    base, cid, rounds = sys.argv[1] or None, int(sys.argv[2]), int(sys.argv[3])
    slowest = 0.0
    done = 0
    for _ in range(rounds):
        guest = SessionGuest(base, cid, says=b"hello\n", patient=True)
        guest.join(60)
        if guest.finish() is not None or guest.answer != bytes(4):
            print(json.dumps({"done": done, "error": repr(guest.finish())}), flush=True)
            return
        slowest = max(slowest, guest.moments["signal"] - guest.moments["finished"])
        done += 1
    print(json.dumps({"done": done, "slowest": slowest, "error": None}), flush=True)


if __name__ == "__main__":
    main()
