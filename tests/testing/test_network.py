"""Owns: the guest's network with a real TCP transfer, through a real passt.

The host between them is a pump of this file's, so that what is shown is the guest's part.
"""

import contextlib
import os
import socket
import struct
import subprocess
import tempfile
import threading

import pytest
from left_out import needs_root, needs_tool, needs_tun
from machine import CID
from peer import wait_until
from scripted_host import NET, OUTPUT, ScriptedHost, exactly, until_end

from nitro_vsock.testing import GuestEmulator, tap

COUNT = int(os.environ.get("NITRO_VSOCK_TEST_TRANSFER", 32 << 20))
GATEWAY = "172.31.10.1"

pytestmark = [needs_tool("passt"), needs_tun, needs_root]


class Echo(threading.Thread):
    """A TCP server that takes everything, then sends it back: the program knows what it was."""

    def __init__(self):
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(30)
        self.port = self._listener.getsockname()[1]
        self.taken = 0
        self.start()

    def run(self):
        """Serve one connection."""
        with self._listener, contextlib.suppress(OSError), tempfile.TemporaryFile() as kept:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(60)
                # The guest keeps its end open: Debian 12's passt sends too much after half a close.
                while self.taken < COUNT and (piece := connection.recv(1 << 20)):
                    kept.write(piece)
                    self.taken += len(piece)
                kept.seek(0)
                connection.sendfile(kept)
                connection.recv(1)


@contextlib.contextmanager
def passt(folder):
    """Run passt; give a connection to it."""
    path = os.path.join(folder, "passt.sock")
    command = ["passt", "--foreground", "--quiet", "--socket", path, "--runas", "0"]
    command += ["--address", tap.ADDRESS, "--netmask", "24", "--gateway", GATEWAY, "--ipv4-only"]
    command += ["--mtu", "0"]  # that of its answers to DHCP, which nobody asks for
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_until(lambda: os.path.exists(path) or process.poll() is not None, what="passt")
        assert process.poll() is None, process.stderr.read()
        with socket.socket(socket.AF_UNIX) as sock:
            wait_until(lambda: sock.connect_ex(path) == 0, what="passt's socket")
            yield sock
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def pump(guest, to_passt):
    """Move frames both ways, until the context is left.

    Towards passt each goes out whole with one send: the one of Debian 12 takes what is left of a
    frame with one recv, and loses its place in the stream where that comes up short.
    """

    def to_guest():
        with contextlib.suppress(OSError):
            while piece := to_passt.recv(1 << 20):
                guest.sendall(piece)

    def from_guest():
        with contextlib.suppress(OSError), guest.makefile("rb", buffering=1 << 20) as stream:
            while len(head := stream.read(4)) == 4:
                to_passt.sendall(head + stream.read(struct.unpack(">I", head)[0]))

    threads = [threading.Thread(target=move) for move in (to_guest, from_guest)]
    for sock in (guest, to_passt):
        sock.settimeout(None)
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for sock in (guest, to_passt):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)


@pytest.mark.parametrize("mtu", [1500, 65520])
def test_a_transfer_both_ways(uds, programs, mtu):
    """Every byte of a TCP transfer arrives, out and back."""
    echo = Echo()
    with (
        ScriptedHost(uds, CID) as host,
        passt(os.path.dirname(uds)) as to_passt,
        GuestEmulator(CID, uds_path=uds, isolation="namespaces", mtu=mtu, timeout=60) as guest,
    ):
        guest.start()
        argv = [b"/bin/transfer", GATEWAY.encode(), b"%d" % echo.port, b"%d" % COUNT]
        host.hand_over(programs.tar("transfer"), argv, flags=b"\4\5")
        output, net = host.accept(OUTPUT), host.accept(NET)
        assert exactly(net, 4) == struct.pack(">I", mtu + 14)
        with pump(net, to_passt):
            output.settimeout(60)
            assert until_end(output) == b"ok %d\n" % COUNT
            assert host.status() == 0
        guest.result()
    echo.join(10)
    assert echo.taken == COUNT
