"""Owns: relays between a guest's socket and a network backend's, and traffic through them.

Must not know: which figures are made of it.
"""

import json
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from arena import OURS, PEERS, REFERENCE, SOCAT

from nitro_vsock import EnclaveArgsReader
from nitro_vsock.testing import child

MTU_HEADER = struct.pack(">I", 1514)
CID = 2016
SOCAT_BUFFER = 1 << 18
"""The best of 8 KiB to 1 MiB, as far as they can be told apart."""
DIRECT = "ceiling: no relay"
ENOUGH = 60.0


@dataclass(frozen=True)
class Wire:
    """A relay with a socket at either end.

    Attributes:
        guest: the guest's end.
        backend: the backend's.
        pid: of the relay; None where there is none.
    """

    guest: socket.socket
    backend: socket.socket
    pid: int | None


@contextmanager
def started(*command, **options):
    """Start a relay; it is gone when the context ends."""
    process = child.start([str(part) for part in command], start_new_session=True, **options)
    with process:
        try:
            yield process
        finally:
            process.kill()


def listening(path):
    """Return a socket that listens at a path."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(128)
    listener.settimeout(ENOUGH)
    return listener


def accepted(listener):
    """Return a connection, blocking as its processes want it."""
    connection = listener.accept()[0]
    connection.settimeout(None)
    return connection


def connected(arena, base, port):
    """Connect to a port of a host as a guest does; it may be about to listen."""
    if arena.transport == "unix":
        return dial(socket.AF_UNIX, f"{base}_{port}")
    return dial(socket.AF_VSOCK, (1, port))


def dial(family, address):
    """Connect, waiting for the one that is to listen there."""
    until = time.monotonic() + ENOUGH
    while True:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.connect(address)
        except (FileNotFoundError, ConnectionError):
            sock.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return sock


class Guest:
    """A guest as far as the host's side can see, from its arguments to the end of its program."""

    def __init__(self, arena, base, cid):
        """Take the arguments and connect to the services."""
        self._connect = lambda offset: connected(arena, base, cid + offset)
        uds_path = str(base) if arena.transport == "unix" else None
        with EnclaveArgsReader(cid, uds_path=uds_path, host_cid=1) as reader:
            reader.read_args()
        self.net = self._connect(2)
        self.net.sendall(MTU_HEADER)
        self._signal = self._connect(5)

    def end(self):
        """Report exit code 0 and go down."""
        with closing(self._connect(4)) as code, self.net, self._signal:
            code.sendall(bytes(4))
            code.recv(4, socket.MSG_WAITALL)


@contextmanager
def ours(arena, folder, count=1):
    """Yield the wires of a process with sessions of this package, and that process."""
    base, path = folder / "net.sock", folder / "backend-ours"
    unix = arena.transport == "unix"
    with ExitStack() as stack:
        listener = stack.enter_context(listening(path))
        stack.callback(path.unlink)
        command = (sys.executable, PEERS / "host_session.py", CID, count, path)
        command += (base,) if unix else ()
        host = stack.enter_context(started(*command, stdout=subprocess.PIPE, text=True))
        assert host.stdout.readline() == "ready\n"
        wires, guests = [], []
        for number in range(count):
            backend = stack.enter_context(accepted(listener))
            guests.append(Guest(arena, base, CID + 8 * number))
            wires.append(Wire(guests[-1].net, backend, host.pid))
        assert host.stdout.readline() == "running\n"
        yield wires
        for guest in guests:
            guest.end()
        assert host.wait(ENOUGH) == 0


@contextmanager
def our_wire(arena, folder):
    """Yield the wire of one session."""
    with ours(arena, folder) as [wire]:
        yield wire


@contextmanager
def reference(arena, _folder):
    """Yield a wire through the reference's loop, on connections of the same kinds."""
    assert arena.language
    guest, theirs = pair(arena)
    backend, other = socket.socketpair()
    with guest, backend, theirs, other:
        fds = (theirs.fileno(), other.fileno())
        with started(arena.folder / "net_reference", *fds, pass_fds=fds) as process:
            theirs.close()
            other.close()
            guest.sendall(MTU_HEADER)
            yield Wire(guest, backend, process.pid)


def pair(arena):
    """Return two connected sockets of the arena's kind."""
    if arena.transport == "unix":
        return socket.socketpair()
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, CID + 2))
        listener.listen(1)
        guest = dial(socket.AF_VSOCK, (1, CID + 2))
        return guest, accepted(listener)


@contextmanager
def socat(arena, folder, buffer=SOCAT_BUFFER):
    """Yield a wire through socat."""
    base, path = folder / "socat.sock", folder / "backend-socat"
    port = CID + 2
    where = f"UNIX-LISTEN:{base}_{port}" if arena.transport == "unix" else f"VSOCK-LISTEN:{port}"
    with listening(path) as listener:
        try:
            with (
                started("socat", "-b", buffer, where, f"UNIX-CONNECT:{path}") as process,
                connected(arena, base, port) as guest,
                accepted(listener) as backend,
            ):
                yield Wire(guest, backend, process.pid)
        finally:
            path.unlink()


@contextmanager
def direct(arena, _folder):
    """Yield a wire without anything in it: what the two ends do at most."""
    guest, backend = pair(arena)
    with guest, backend:
        yield Wire(guest, backend, None)


@contextmanager
def wires(arena):
    """Yield everybody's wire by name, ours first."""
    relays = {OURS: our_wire, REFERENCE: reference, DIRECT: direct}
    if shutil.which("socat"):
        relays[SOCAT] = socat
    with ExitStack() as stack:
        found = {}
        for name, relay in relays.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nvn")))
            found[name] = stack.enter_context(relay(arena, folder))
        yield found


def converse(arena, first, second):
    """Let both ends run their parts, a process each; return what they print.

    Args:
        arena: for the tool.
        first: a socket and the arguments for it; this end gets the word to begin last.
        second: the same for the other end.
    """
    assert arena.language
    with ExitStack() as stack:
        running = []
        for sock, (verb, *args) in (first, second):
            command = [str(part) for part in (arena.folder / "traffic", verb, sock.fileno(), *args)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[sock.fileno()],
                start_new_session=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            running.append(process)
        for process in running:
            assert process.stdout.readline() == "ready\n"
        for process in reversed(running):
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=ENOUGH)[0] for process in running]
        assert all(process.returncode == 0 for process in running), said
        return [json.loads(text) for text in said]


def relay_cpu(wire):
    """Return the processor seconds of a relay so far, all threads."""
    if wire.pid is None:
        return 0.0
    return sum(
        int(path.read_text().split()[0]) / 1e9
        for path in Path(f"/proc/{wire.pid}/task").glob("*/schedstat")
    )


def times_on_a_processor(pid):
    """Return how often the threads of a process were given a processor so far."""
    return sum(
        int(path.read_text().split()[2]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")
    )
